"""Machine code of the CUDA kernels, kept on disk: compiling those of a ResNet takes seconds, reading them none.

A file is named by the hash of all that its code depends on: source (which includes nothing), architecture, options and
compiler. The driver is not part of that: it loads machine code as it is. Files lie in ``onlinenorm/kernels`` of the
user's cache folder ($XDG_CACHE_HOME, else ~/.cache), or in ``onlinenorm`` of the folder that torch's own run-time
compiled kernels were sent to ($PYTORCH_KERNEL_CACHE_PATH); USE_PYTORCH_KERNEL_CACHE=0 turns both caches off. Where no
file can be read or written, kernels are compiled in every process.
"""

import contextlib
import hashlib
import logging
import os
import tempfile
import time
from pathlib import Path

from onlinenorm.ops.fused.nvrtc import compile_source, compiler_version

logger = logging.getLogger(__name__)

DIGEST = hashlib.sha256().digest_size
HEADER = 8 + DIGEST  # bytes before the code: its length, and a digest of key and code
ABANDONED = 3600.0  # seconds after which a file that is not yet in place belongs to nobody


def cubin(source: str, architecture: str, options: tuple[str, ...]) -> bytes:
    """``nvrtc.compile_source`` of the same arguments, from disk where some process has compiled them before."""
    folder = _folder()
    if folder is None:
        return compile_source(source, architecture, options)
    key = hashlib.sha256(repr((source, architecture, options, compiler_version())).encode()).hexdigest()
    file = folder / f"{key}.cubin"
    code = _read(file, key)
    if code is None:
        code = compile_source(source, architecture, options)
        with contextlib.suppress(OSError):
            _write(file, key, code)
    return code


def _folder() -> Path | None:
    """Where files are kept; None: nowhere."""
    if os.environ.get("USE_PYTORCH_KERNEL_CACHE") == "0":
        return None
    if path := os.environ.get("PYTORCH_KERNEL_CACHE_PATH"):
        return Path(path) / "onlinenorm"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onlinenorm" / "kernels"
    except RuntimeError:  # a container's user without a home
        return None


def _header(key: str, code: bytes) -> bytes:
    return len(code).to_bytes(8, "little") + hashlib.sha256(key.encode() + code).digest()


def _read(file: Path, key: str) -> bytes | None:
    """The code in a file that is there and whole."""
    try:
        stored = file.read_bytes()
    except OSError:
        return None
    code = stored[HEADER:]
    if stored[:HEADER] == _header(key, code):
        return code
    logger.warning("%s is damaged; the kernel is compiled anew", file)
    return None


def _write(file: Path, key: str, code: bytes) -> None:
    """Put a whole file in place at once, whatever other processes write there at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(file.parent)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(_header(key, code) + code)
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException:  # Ctrl-C too
        os.unlink(temporary)
        raise


def _remove_abandoned(folder: Path) -> None:
    """Removes what writers that were killed have left; a write takes milliseconds, and none an hour."""
    for temporary in folder.glob("*.tmp"):
        with contextlib.suppress(OSError):  # another process may have removed it
            if time.time() - temporary.stat().st_mtime > ABANDONED:
                temporary.unlink()
