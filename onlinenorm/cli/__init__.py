"""What train.py and the scripts that take its arguments share: arguments, composition by Hydra, help."""
