"""Commands; those in bench/ and dev/ share modules as scripts.bench.*."""
