"""Load what was trained, and use it: logits, text, routing.

Shape legend: B batch, T positions, V vocabulary.
"""

import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

import torch
from torch import Tensor

from moesaic.config import validate
from moesaic.data.tokenizers import StreamDecoder, Tokenizer
from moesaic.errors import CheckpointError, DataError, RecipeError
from moesaic.generate import SampleOptions, stream
from moesaic.machine import keep_freed_memory, multiplies_bf16
from moesaic.model.config import ModelConfig
from moesaic.model.lora import LoRAOptions, add_lora, merge_lora
from moesaic.model.packed import Layout, pack
from moesaic.model.transformer import LanguageModel, Output
from moesaic.native import library
from moesaic.offload.bank import OffloadedExperts
from moesaic.offload.model import FOLDER, read_on_disk, replace_banks, shape_of
from moesaic.offload.origins import Files
from moesaic.offload.store import INDEX
from moesaic.routing import Routing
from moesaic.weights.checkpoint import newest_valid, read_checkpoint, step_of
from moesaic.weights.contents import Contents
from moesaic.weights.hf import is_hf, load_hf, load_tokenizer, open_hf, stop_ids
from moesaic.weights.manifest import is_valid
from moesaic.weights.shards import Shards
from moesaic.weights.streamed import Sources, banks_in_files, experts_in_files, is_expert

DISK_MEMORY = 2**30  # bytes for experts that are on disk, where the caller does not say


@dataclass(frozen=True)
class LM:
    """A model with its tokenizer, where it came with one. ``path`` is the directory that was read,
    ``stop_ids`` end a text besides the tokenizer's end-of-text."""

    config: ModelConfig
    model: LanguageModel
    known_tokenizer: Tokenizer | None
    path: Path
    stop_ids: frozenset[int] = frozenset()

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises DataError for a directory that has none; ids still work."""
        if self.known_tokenizer is None:
            raise DataError(f"{self.path}: has no tokenizer.json; put the model's own there, or give ids")
        return self.known_tokenizer

    @torch.inference_mode()
    def logits(self, ids_BT: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Next-token logits, float32 [B, T, V]. ``attention_mask`` [B, T] is 0 at padding."""
        output: Output = self.model(self.to_device(ids_BT), self._real(attention_mask))
        assert output.logits_BTV is not None
        return output.logits_BTV.float()

    @torch.inference_mode()
    def routing(self, ids_BT: Tensor, attention_mask: Tensor | None = None) -> list[Routing]:
        """One Routing per sparse layer, for the B·T tokens in row order."""
        output: Output = self.model(self.to_device(ids_BT), self._real(attention_mask), logits=False)
        return output.routings

    def lay_out(self, weights: str | None = None) -> None:
        """Lay the weights out for decoding (model/packed.py): ``packed``, ``int8``, or leave them ``stored``.
        None packs a model on a CPU where that makes it faster. Raises RecipeError."""
        if weights is None:
            weight = self.model.lm_head.weight
            bf16 = weight.dtype == torch.bfloat16 and multiplies_bf16("cpu")
            # Kernels of our own read any dtype faster; where weights stay in the cache that is no gain.
            large = library.available() and self.config.parameters().total > 2**25
            weights = "packed" if weight.device.type == "cpu" and (bf16 or large) else "stored"
        if weights in get_args(Layout):
            pack(self.model, cast(Layout, weights))
        elif weights != "stored":
            raise RecipeError(f"--weights {weights}: stored, packed and int8 are the layouts")

    def generate(
        self,
        text_or_ids: str | Sequence[int] | Tensor,
        max_new_tokens: int = 100,
        temperature: float = 0.0,
        seed: int | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Sequence[str] = (),
    ) -> str:
        """The continuation of a text (or of its ids) as text, without the prompt.

        Temperature 0 is greedy. Ends before any of ``stop``, or at the tokenizer's end-of-text.
        Raises RecipeError for an empty prompt and DataError for characters the model cannot read.
        """
        return "".join(self.stream(text_or_ids, max_new_tokens, temperature, seed, top_k, top_p, stop))

    def stream(
        self,
        text_or_ids: str | Sequence[int] | Tensor,
        max_new_tokens: int = 100,
        temperature: float = 0.0,
        seed: int | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """``generate``, piece by piece. A piece never ends inside a character, and no piece holds
        the beginning of a stop text that then follows."""
        ids_BT = self.ids(text_or_ids)
        wanted = {"temperature": temperature, "seed": seed, "top_k": top_k, "top_p": top_p}
        options = validate(SampleOptions, wanted, where="generate")
        decoder, held = StreamDecoder(self.tokenizer), ""
        for next_B in stream(self.model, ids_BT, max_new_tokens, options):
            token = int(next_B[0])
            if token == self.tokenizer.eos_id or token in self.stop_ids:
                break
            held += decoder.push(token)
            found = [held.find(text) for text in stop if text and text in held]
            if found:
                if min(found):
                    yield held[: min(found)]
                return
            ready = len(held) - _open_end(held, stop)
            if ready:
                yield held[:ready]
                held = held[ready:]
        rest = held + decoder.flush()
        if rest:
            yield rest

    def ids(self, text_or_ids: str | Sequence[int] | Tensor) -> Tensor:
        """A prompt as ids, int64 [1, T]; a text begins as the tokenizer has texts begin (Llama's ``<s>``)."""
        if isinstance(text_or_ids, Tensor):
            ids_BT = text_or_ids.long() if text_or_ids.ndim == 2 else text_or_ids.long().reshape(1, -1)
        else:
            if isinstance(text_or_ids, str):
                text_or_ids = self.tokenizer.encode(text_or_ids, special=True).tolist()
            ids_BT = torch.tensor([list(text_or_ids)], dtype=torch.int64)
        if ids_BT.shape[1] == 0:
            raise RecipeError("the prompt is empty; give at least one character")
        if ids_BT.shape[0] != 1:
            raise RecipeError("generate takes one sequence; use moesaic.generate.stream for a batch")
        return self.to_device(ids_BT)

    def to_device(self, ids_BT: Tensor) -> Tensor:
        """Where the model is."""
        return ids_BT.to(self.model.lm_head.weight.device)

    def _real(self, attention_mask: Tensor | None) -> Tensor | None:
        return None if attention_mask is None else self.to_device(attention_mask).bool()


def load(
    directory: str | Path, device: str = "cpu", *, as_stored: bool = False, memory: int | None = None
) -> LM:
    """Open a run directory, one of its checkpoints, its ``model`` folder, an export, or any Hugging Face
    directory of a family that moesaic knows (weights/families.py); checksums verified where there are any.

    Of a run directory, the finished ``model`` is taken unless a newer checkpoint exists; it becomes float32,
    or with ``as_stored`` keeps the bfloat16 in which frozen experts were left, to train on from there. Raises
    CheckpointError (exit 4) naming the damaged file, RecipeError for a path that holds no model,
    ResourceError for a model that memory cannot hold. With ``memory`` experts stay on disk, in whatever files
    the model has, and so many bytes hold those in use; a run with experts on disk has ``DISK_MEMORY``
    otherwise.
    """
    path = Path(directory).expanduser()
    if not path.is_dir():
        raise RecipeError(f"{path}: no such directory")
    if memory is not None and device != "cpu":
        raise RecipeError("offload.memory: experts on disk are computed on the CPU; leave --device out")
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise RecipeError(f"device = {device!r}: PyTorch sees none such here; use cpu, or cuda where it is")
    keep_freed_memory()
    if is_hf(path):
        config, model = load_hf(path, device, warnings.warn, memory)
        _close_with(model)
        return LM(config, model, load_tokenizer(path), path, stop_ids(path))
    path, contents = _find(path)
    try:
        about = contents.json["moesaic.json"]
        tensors = contents.tensors["model.safetensors"]
        tokenizer = contents.files["tokenizer.json"]
    except KeyError as missing:
        raise CheckpointError(f"{path}: is no moesaic model (no {missing.args[0]})") from None
    if about.get("format") != 1:
        raise CheckpointError(f"{path}: is of format {about.get('format')!r}; this version reads format 1")
    config = validate(ModelConfig, about["model"], where=str(path / "moesaic.json"))
    with torch.device("meta"):
        model = LanguageModel(config)
        if "lora" in about:
            add_lora(model, validate(LoRAOptions, about["lora"], where=str(path / "moesaic.json")))
        if "offload" in about:
            home = path.resolve()
            folder = (home.parent if home.name == "model" else home.parent.parent) / FOLDER
            room = DISK_MEMORY if memory is None else memory
            experts = read_on_disk(folder, about["offload"], contents.tensors[INDEX], room)
            replace_banks(model, experts.banks)
        elif memory is not None:
            replace_banks(model, banks_in_files(_files(path, config, tensors), config, memory))
            tensors = {name: tensor for name, tensor in tensors.items() if not is_expert(name)}
    _close_with(model)
    model.to_empty(device=device)
    if config.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
        tensors = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    try:
        model.load_state_dict(tensors)
        if as_stored and "lora" not in about:  # a sum of the two is not to be rounded
            for name, parameter in model.named_parameters():
                parameter.data = parameter.data.to(tensors[name].dtype)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise CheckpointError(f"{path}: model.safetensors does not fit moesaic.json: {reason}") from None
    merge_lora(model)  # a run keeps matrices and changes apart; whoever opens it sees their sum
    stop = frozenset(about.get("stop_ids", []))
    return LM(config, model.eval(), Tokenizer.parse(tokenizer, f"{path}/tokenizer.json"), path, stop)


def _close_with(model: LanguageModel) -> None:
    """Have what holds its experts on disk, if they are, end with the model."""
    banks = [module.experts for module in model.moe_modules()]
    for source in {bank.source for bank in banks if isinstance(bank, OffloadedExperts)}:
        weakref.finalize(model, source.close)


def _files(path: Path, config: ModelConfig, tensors: dict[str, Tensor]) -> Files:
    """Where the experts of a model of our own are in its file."""
    sources: Sources = {name: [(name, ())] for name in tensors if is_expert(name)}
    try:
        return experts_in_files(config, sources, Shards(path))
    except KeyError as missing:
        reason = f"{path}: model.safetensors does not fit moesaic.json: no {missing.args[0]}"
        raise CheckpointError(reason) from None


def experts_of(directory: str | Path, config: ModelConfig) -> Files:
    """Where the experts of a model are in its files, for a run that begins from them. Raises RecipeError
    where ``config`` has other experts, or they are on disk already, and as ``load``."""
    path = Path(directory).expanduser()
    if is_hf(path):
        found = open_hf(path)
        theirs, files = found.config, found.experts()
    else:
        path, contents = _find(path)
        about = contents.json["moesaic.json"]
        if "offload" in about or "lora" in about or path.parent.name == "checkpoints":
            raise RecipeError(
                f"start = {directory}: its experts do not stay where they are now; export it first (moesaic "
                "export), and begin from that"
            )
        theirs = validate(ModelConfig, about["model"], where=str(path / "moesaic.json"))
        files = _files(path, theirs, contents.tensors["model.safetensors"])
    mine = (config.moe_layers, config.experts.count, shape_of(config))
    if mine != (theirs.moe_layers, theirs.experts.count, shape_of(theirs)):
        raise RecipeError(f"start = {directory}: model.* makes other experts of it; leave model.experts out")
    return files


def described(directory: str | Path) -> tuple[ModelConfig, Path | None]:
    """What ``load`` would open, without its weights: the model's settings and its tokenizer.json, if any."""
    path = Path(directory).expanduser()
    if not path.is_dir():
        raise RecipeError(f"{path}: no such directory")
    if is_hf(path):
        config = open_hf(path).config
    else:
        path, contents = _find(path)
        config = validate(ModelConfig, contents.json["moesaic.json"]["model"], str(path / "moesaic.json"))
    tokenizer = path / "tokenizer.json"
    return config, tokenizer if tokenizer.exists() else None


def _find(path: Path) -> tuple[Path, Contents]:
    """The model directory inside ``path`` that is furthest trained, read and verified."""
    if (path / "manifest.json").exists():
        return path, read_checkpoint(path)
    if not (path / "recipe.toml").exists():
        raise RecipeError(f"{path}: holds no moesaic run, no model and no config.json")
    finished = path / "model"
    try:
        newest = newest_valid(path, warnings.warn)
    except CheckpointError:
        if not is_valid(finished):
            raise
        return finished, read_checkpoint(finished)
    if finished.is_dir():
        contents = read_checkpoint(finished)
        if newest is None or step_of(newest) <= contents.json["moesaic.json"]["step"]:
            return finished, contents
    if newest is None:
        raise RecipeError(f"{path}: this run has saved no checkpoint yet")
    try:
        return newest, read_checkpoint(newest)
    except (CheckpointError, OSError):
        if newest.exists():
            raise
        return _find(path)  # the run goes on, and has replaced it meanwhile


def _open_end(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of ``text`` could begin one of ``stop``."""
    longest = max((len(s) for s in stop), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-size:]) for s in stop):
            return size
    return 0
