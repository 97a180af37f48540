"""Files of weights that hold tensors and texts only: safetensors, or torch's own format where that is not installed."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from onlinenorm.errors import DeployError

WEIGHTS = ".safetensors" if find_spec("safetensors") else ".pt"


def write_weights(state: dict[str, Tensor], about: dict[str, str], path: Path) -> None:
    """Writes a state dict, and texts `about` it, as its suffix says.

    A .pt file holds the state dict itself where there are no texts, else {"state": ..., "about": ...}.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path, metadata={"format": "pt", **about})
    else:
        torch.save({"state": state, "about": about} if about else state, path)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(state dict, texts) of a file of `write_weights`; DeployError for any other. Never runs code of the file."""
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        content = torch.load(path, map_location="cpu", weights_only=True)
        return (content["state"], content["about"]) if "about" in content else (content, {})
    except FileNotFoundError:
        raise DeployError(f"{path}: does not exist") from None
    except Exception as error:  # whatever a damaged file makes its readers raise; torch's advises to load it regardless
        raise DeployError(f"{path}: is no file of weights, or damaged ({type(error).__name__})") from error
