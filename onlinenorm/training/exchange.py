"""How the processes of a run exchange statistics: told after its first step, as layers choose when they meet others."""

from typing import Any

import pytorch_lightning as pl

from onlinenorm.normalizers.exchange import exchange_of
from onlinenorm.text import plural


class ExchangeNote(pl.Callback):
    """Prints, after the first step of a start, what `results.json` then records: see `ImageClassifier.exchange`."""

    def __init__(self) -> None:
        self._told = False

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if self._told:
            return
        self._told = True
        found = exchange_of(module.network)
        module.exchange = None if found is None else found._asdict()
        if module.exchange and trainer.is_global_zero:
            print(f"  {sentence(module.exchange)}", flush=True)


def sentence(exchange: dict[str, Any]) -> str:
    """An `Exchange` for people."""
    by_kernels, gathered = exchange["by_kernels"], exchange["gathered"]
    told = f"statistics of {exchange['processes']} processes "
    if not by_kernels:
        return f"{told}gathered by collectives: {exchange['reason']}"
    told += f"exchanged by the kernels of {plural(by_kernels, 'layer')}, in symmetric memory"
    return f"{told}; gathered by collectives for {gathered}: {exchange['reason']}" if gathered else told
