"""A trained model as a folder to pass on: trained weights in a small dtype, configuration, card."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from unislu_llm.config import LoraConfig
from unislu_llm.decoding.other_recognisers import CTRANSLATE2
from unislu_llm.errors import UserError
from unislu_llm.io import (
    MODEL_FILE,
    RATES_FILE,
    RECOGNISER,
    SUMS_FILE,
    WEIGHTS_FILE,
    check_saved,
    find_model,
    new_folder,
    sha256,
    write_json,
    write_sums,
)
from unislu_llm.model_card import CARD, read_note, read_results, write_card
from unislu_llm.models.base import SLUModel
from unislu_llm.models.saved import Description
from unislu_llm.run_folder import Run, find_run, load_model
from unislu_llm.tasks import LabelTask, Span
from unislu_llm.tokenizer import Example
from unislu_llm.utterance import Utterance

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_HASHED = (WEIGHTS_FILE, MODEL_FILE, RATES_FILE)  # not the card, which people edit
_WRITTEN = (*_HASHED, CARD, SUMS_FILE, RECOGNISER)
# Not predictions, which may quote people.
PUBLISHED = (*_WRITTEN, f"{RECOGNISER}/*", "LICENSE*", "NOTICE*")
_TEXT = "the council met in paris on monday"


def export(folder: str | Path, out: Path, *, names: Mapping[str, str], dtype: str = "bf16",
           licence: str = "", results: Sequence[Path] = (), data_note: Path | None = None,
           check: bool = True, published: str = "", lora_scale: float = 1.0,
           lora_rank: int = 0) -> tuple[int, float | None]:
    """Write a folder; an earlier export there is replaced when the new one is whole.

    Arguments are those of `unislu export`, with public names of `encoder`, `llm` and `recogniser`
    where the run names a folder, and whether to `check` the result. A saved model that makes the
    hypotheses goes with it, where no name is given. The card's examples use the name under which it
    will be `published`, if it will. Other files in an earlier export (a LICENSE, predictions) stay.

    Returns:
        Its size, bytes, and the largest difference of a token's loss from the original, nats.

    Raises:
        UserError: no such run, `out` holds something else, a base that is a folder of this
            machine, weights that the dtype does not hold, or scores of another model.
    """
    run, kept = find_run(folder), _kept(out)
    if run.config is None:
        raise UserError(f"{folder} is a saved model without its run; give the run folder "
                        "(config.yaml, versions.json), which the model card is made from. An "
                        "export is published as it is by `hf upload NAME FOLDER`")
    check_saved(run.model)
    saved, note = Description.read(run.model), read_note(data_note)
    named = names.get("recogniser") or saved.model.recogniser in ("", "ctc")
    maker = None if named else find_model(Path(saved.model.recogniser))
    if maker is not None:
        saved.model.recogniser = f"./{RECOGNISER}"
    bases = Description.read(maker).bases if maker else {}
    passed = {part: names.get(part, "") for part, base in bases.items()
              if base.name == getattr(saved.model, part)}  # another one may have another name
    _name_publicly(saved, names)
    state, whole = _weights(run.model / WEIGHTS_FILE), lora_scale == 1 and not lora_rank
    if not whole:
        _reduce_lora(state, saved.model.lora, lora_scale, lora_rank)
    with new_folder(out) as new:
        count = _write_weights(state, new / WEIGHTS_FILE, dtype)
        write_json(new / MODEL_FILE, saved.model_dump())
        if (run.model / RATES_FILE).is_file():  # runs that start from the export take them up
            shutil.copyfile(run.model / RATES_FILE, new / RATES_FILE)
        write_sums(new, _HASHED)
        if maker is not None:
            _add_recogniser(maker, new / RECOGNISER, passed, dtype, licence)
        difference = _compare(run, new) if check and whole else None
        # Scores belong to weights, not to names: a score file is taken where its hash is one of
        # these two.
        hashes = {sha256(new / WEIGHTS_FILE): "these weights"}
        if whole:
            hashes.setdefault(sha256(run.model / WEIGHTS_FILE),
                              "the run's weights, not yet in this dtype")
        write_card(new / CARD, run, saved, read_results(results, hashes), note, out=out,
                   published=published, licence=licence, dtype=dtype, parameters=count,
                   difference=difference, lora_scale=lora_scale, lora_rank=lora_rank)
        size = sum(path.stat().st_size for path in new.rglob("*") if path.is_file())
        for path in kept:
            path.rename(new / path.name)
    return size, difference


def _kept(out: Path) -> list[Path]:
    """What stays of an earlier export."""
    there = sorted(out.iterdir()) if out.is_dir() else [out] if out.exists() else []
    try:
        # Its metadata tells an export from any other folder with weights, which nobody wants gone.
        with safe_open(out / WEIGHTS_FILE, framework="pt") as file:
            known = "exported" in (file.metadata() or {})
    except (OSError, SafetensorError):
        known = False
    if there and not known:
        raise UserError(f"--out {out} is not empty and no export ({there[0].name}, ...); give a "
                        "new folder")
    return [path for path in there if path.name not in _WRITTEN]


def _name_publicly(saved: Description, names: Mapping[str, str]) -> None:
    """Give a model's base checkpoints names that hold on any machine."""
    for key in ("encoder", "llm", "recogniser"):
        given, name = names.get(key, ""), getattr(saved.model, key)
        used = key in saved.bases or key != "llm"  # Whisper may hear for an LLM that only reads
        if given and not used:
            raise UserError(f"--{key} {given}: the model has none")
        if given:
            setattr(saved.model, key, given)
            if key in saved.bases:
                saved.bases[key].name, saved.bases[key].revision = given, None
        # What resolves to a folder here is one, even where it looks like a name.
        elif used and name and name != f"./{RECOGNISER}" and (
                Path(plain := name.removeprefix(CTRANSLATE2)).exists()
                or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", plain)):
            raise UserError(f"model.{key} '{name}' is a folder of this machine; say what it is "
                            f"elsewhere by --{key} NAME, e.g. a name on the Hugging Face hub")


def _add_recogniser(model: Path, new: Path, names: Mapping[str, str], dtype: str,
                    licence: str) -> None:
    """Export the model that makes hypotheses, with a card; what is an export is copied."""
    if find_run(model).config is not None:
        export(model, new, names=names, dtype=dtype, licence=licence, check=False)
        return
    new.mkdir()
    for path in filter(Path.is_file, model.iterdir()):
        shutil.copyfile(path, new / path.name)
    if (own := model / RECOGNISER).is_dir():  # it reads hypotheses as well
        _add_recogniser(own, new / RECOGNISER, names, dtype, licence)


def _weights(path: Path) -> dict[str, Tensor]:
    """Trained weights of a run, every value finite."""
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy or train it again") from error
    if bad := [name for name, value in state.items() if not value.isfinite().all()]:
        raise UserError(f"{path}: a value of '{bad[0]}' is not finite")
    return state


def _reduce_lora(state: dict[str, Tensor], lora: LoraConfig, scale: float, rank: int) -> None:
    """Scale LoRA's updates `B (out, r) @ A (r, in)`, in place (WiSE-FT, arXiv 2109.01903), and keep
    the `rank` largest directions of each, which come nearest (Eckart and Young 1936); 0: all."""
    adapters = [name for name in state if ".lora_A." in name]
    if not 0 < scale <= 1 or not adapters:
        raise UserError(f"--lora-scale {scale:g}, --lora-rank {rank}: give a share over 0 up to 1, "
                        "of a model with LoRA")
    if not 0 <= rank <= lora.rank:
        raise UserError(f"--lora-rank {rank}: the model's is {lora.rank}; give 1 to {lora.rank}")
    for name in adapters:
        other = name.replace(".lora_A.", ".lora_B.")
        state[other] = state[other] * scale
        if rank:
            # B A = Q (R A): the SVD of a product of two thin matrices is that of a small one.
            q, r = torch.linalg.qr(state[other].float())
            u, values, v = torch.linalg.svd(r @ state[name].float(), full_matrices=False)
            state[other], state[name] = (q @ u * values)[:, :rank], v[:rank]
    if rank:
        lora.rank, lora.alpha = rank, lora.alpha * rank / lora.rank


def _write_weights(state: Mapping[str, Tensor], target: Path, dtype: str) -> int:
    """Write weights in a dtype; returns how many there are."""
    state = {name: value.to(DTYPES[dtype]).contiguous() for name, value in state.items()}
    if bad := [name for name, value in state.items() if not value.isfinite().all()]:
        raise UserError(f"a value of '{bad[0]}' does not fit {dtype}; give --dtype bf16 or fp32")
    # One entry: safetensors writes several in any order, and equal exports should have one hash.
    save_file(state, target, metadata={"exported": dtype})
    target.chmod(0o644)  # safetensors leaves it to the owner alone
    return sum(value.numel() for value in state.values())


@torch.no_grad()
def _compare(run: Run, exported: Path) -> float:
    """Largest difference of a token's loss between a run's model and its export, in nats."""
    # Weights that were rounded away, or never reached the file, show here and not in a hash.
    assert run.config is not None
    half = run.config.train.precision == "bf16"
    model = load_model(run, run.config.train.precision)
    # Three seconds of a rising tone: a clip that every machine can make, with all of its bands.
    time = torch.arange(48_000) / 16_000
    wave = 0.3 * torch.sin(2 * torch.pi * (200 + 100 * time) * time)
    examples = list(_examples(model))
    batch = model.collator().from_waves(examples, [wave] * len(examples)).to(model.device)
    losses = []
    for _ in range(2):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
            losses.append(model.losses(batch))
        model.load_trained(exported)
    return float((losses[1] - losses[0]).abs().max())


def _examples(model: SLUModel) -> Iterator[Example]:
    """A transcript alone, and one annotated for each task, so that every kind of token counts."""
    hypothesis = _TEXT if model.reads_hypothesis else None
    yield Example(Utterance("tone", None, _TEXT, hypothesis=hypothesis), None)
    for task in model.registry:
        label = task.labels[0]
        value = ((Span(label, 4, 11),) if not isinstance(task, LabelTask)
                 else (label,) if task.multi else label)
        yield Example(Utterance("tone", None, _TEXT, {task.name: value}, hypothesis=hypothesis),
                      task.name)
