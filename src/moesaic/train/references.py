"""What the model that a run begins with gives the answers of every pair: computed once, kept on disk.

The file's name is a hash of the pairs, of the model's settings and weights and of the precision, so another
model, other data or another cut never finds it.
"""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from moesaic.data.preferences import PreferenceStore, Reference
from moesaic.data.store import Split
from moesaic.errors import DataError
from moesaic.files import write_atomic
from moesaic.model.transformer import LanguageModel
from moesaic.train.objectives import Batch, answer_logprobs

_BATCH_PAIRS = 8
SPLITS: tuple[Split, ...] = ("train", "val")


def add_reference(
    store: PreferenceStore,
    model: LanguageModel,
    folder: Path,
    precision: Callable[[], AbstractContextManager[object]],
    bf16: bool,
    say: Callable[[str], None],
) -> None:
    """Give the store its reference: from ``folder`` where it was computed before, else by running ``model``,
    which must still be as the run began. Raises DataError where the folder cannot be written."""
    identity = _identity(store, model, bf16)
    store.fingerprint = identity  # so that a run is not resumed against another reference
    path = folder / "references" / f"{identity}.safetensors"
    if path.exists():
        try:
            kept = safetensors.torch.load_file(path)
            store.reference = {split: kept[split].numpy() for split in SPLITS}
            return
        except (OSError, KeyError, safetensors.SafetensorError):
            say(f"{path}: damaged; computed again")
    store.reference = {split: _computed(store, model, split, precision, say) for split in SPLITS}
    tensors: dict[str, torch.Tensor] = {split: torch.from_numpy(store.reference[split]) for split in SPLITS}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path.parent}: cannot be made ({error.strerror}); set data.cache") from None
    write_atomic(path, safetensors.torch.save(tensors))


@torch.no_grad()
def _computed(
    store: PreferenceStore,
    model: LanguageModel,
    split: Split,
    precision: Callable[[], AbstractContextManager[object]],
    say: Callable[[str], None],
) -> Reference:
    total, rows = len(store.pairs[split]), []
    say(f"reference: {total:,} pairs ({split})")
    was_training, device = model.training, str(model.lm_head.weight.device)
    model.eval()
    for start in range(0, total, _BATCH_PAIRS):
        windows = store.windows(split, list(range(start, min(total, start + _BATCH_PAIRS))))
        with precision():
            logp_B, _, _ = answer_logprobs(model, Batch(*windows).to(device))
        rows.append(logp_B.float().view(-1, 2).cpu().numpy())
    model.train(was_training)
    return np.concatenate(rows).astype(np.float32)


def _identity(store: PreferenceStore, model: LanguageModel, bf16: bool) -> str:
    digest = hashlib.sha256(f"{store.fingerprint} {bf16} {model.config.model_dump_json()}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
