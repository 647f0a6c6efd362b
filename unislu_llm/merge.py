"""A trained model as a plain causal LM, which every server runs, and the proof that it is one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from unislu_llm.config_file import shipped
from unislu_llm.decoding.greedy import Greedy, feed
from unislu_llm.errors import UserError
from unislu_llm.export import DTYPES
from unislu_llm.io import new_folder, portable, read_json_lines, write_text
from unislu_llm.merge_whisper import merge_whisper
from unislu_llm.models.lora import merge_lora
from unislu_llm.models.markers import write_markers
from unislu_llm.models.saved import Description
from unislu_llm.run_folder import find_run, load_model
from unislu_llm.tasks import SEPARATOR, TaskRegistry
from unislu_llm.tokenizer import Example
from unislu_llm.utterance import Utterance

# Nats by which rounding of weights may make another token the likeliest.
_CLOSE = {"fp32": 0.01, "fp16": 0.1, "bf16": 0.5}
# Of grammars, prompts and Markdown: what HTML escapes would be other text in them.
_TEMPLATES = Environment(loader=PackageLoader("unislu_llm", "."), autoescape=False)  # nosec B701
_TEMPLATES.filters["quoted"] = lambda text: json.dumps(text, ensure_ascii=False)


def merge(folder: str | Path, out: Path, *, dtype: str = "bf16", licence: str = "",
          manifests: Sequence[Path] = (), published: str = "") -> str:
    """Write a folder for `AutoModelForCausalLM` that answers as the trained model does; of a
    Whisper, see :func:`merge_whisper`.

    Parity prompts are 30 hypotheses of `manifests` (default: the mini corpus). Returns what there
    is to say of it. Raises UserError, and writes nothing: no such model, or one that reads no
    hypothesis; `out` holds something; no hypotheses; LoRA changes nothing; other answers.
    """
    run = find_run(folder)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out} is not empty; give a new folder")
    saved = Description.read(run.model)
    if saved.model_type == "whisper_slu":
        return merge_whisper(run, out, dtype)
    if saved.model_type != "speech_llm" or saved.model.hypothesis == "none":
        raise UserError(f"--merged: {folder} answers speech alone, and a plain causal LM reads "
                        "text; it takes a model of an LLM with a hypothesis in its prompt")
    clips = _clips(manifests)
    base, close = saved.bases["llm"].name, _CLOSE[dtype]
    close += 0.5 * (saved.model.quantization != "none")  # it computes in bf16 or 8 bits
    with new_folder(out) as new:
        rows = _write(load_model(run, "fp32"), new, dtype, clips)
        facts: dict[str, Any] = {"dtype": dtype, "close": close, "model": saved.model, "rows": rows,
                                 "respelled": _check(new, rows, close)}
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(new / "parity.jsonl", "".join(lines))
        for file in (*run.model.glob("LICENSE*"), *run.model.glob("NOTICE*"),
                     Path(__file__).with_name("parity.py")):
            shutil.copyfile(file, new / file.name)
        write_text(new / "README.md", _text(
            "merged_card", name=published or out.name, tasks=list(run.registry()), licence=licence,
            base=portable(base) if Path(base).exists() else base, **facts))
    found = shutil.which("convert_hf_to_gguf.py")
    command = [sys.executable, found or "llama.cpp/convert_hf_to_gguf.py", str(out), "--outfile",
               f"{out}/model.gguf", "--outtype", dtype.replace("fp", "f")]
    made = found and subprocess.run(command).returncode == 0
    return _text("merged_report", out=out, command=command[1:], found=found, made=made, **facts)


def _text(template: str, **values: Any) -> str:
    return _TEMPLATES.get_template(f"{template}.jinja").render(values) + "\n"


def _clips(manifests: Sequence[Path]) -> list[tuple[str, str]]:
    """Id and hypothesis of 30 clips, in turn from each manifest."""
    paths = manifests or sorted((shipped() / "recipes" / "data" / "mini").glob("*_dev.jsonl"))
    found = [[(str(row.get("id", "")), " ".join(row["hypothesis"].split()))
              for row in read_json_lines(path) if str(row.get("hypothesis") or "").strip()]
             for path in paths]
    if not any(found):
        raise UserError(f"--manifest {', '.join(map(str, paths))}: no row has a hypothesis to "
                        "make prompts of; `unislu transcribe` writes them")
    return [clip for some in zip_longest(*found) for clip in some if clip][:30]


def grammars(registry: TaskRegistry) -> dict[str, str]:
    """Grammar files by name: of a transcript alone, of each task (`-outputs`: behind its marker),
    and of `all`; GBNF for llama.cpp and (as .ebnf) XGrammar, Lark for llguidance."""
    tasks = {"asr": [], "all": [*registry]} | {task.name: [task] for task in registry}
    tasks |= {f"{task.name}-outputs": [task] for task in registry}
    return {f"{name}.{kind}": _text("grammar", tasks=some, name=name, kind=kind, mark=SEPARATOR)
            for name, some in tasks.items() for kind in ("gbnf", "ebnf", "lark")}


def _write(model: Any, folder: Path, dtype: str, clips: Sequence[tuple[str, str]]) -> list[Any]:
    """Write model, tokenizer and grammars; returns prompts with the answers before the merge."""
    t, llm, config = model.tokenizer, model.llm, model.config
    first = t.base.bos_token if model.prefix != t.prompt_ids(config.prompt_prefix) else ""
    t.base.chat_template = _text(
        "chat_template", begin=first + config.prompt_prefix + config.hypothesis_prompt,
        end=config.prompt_suffix).strip()
    with torch.inference_mode():
        rows = list(_rows(model, clips))
    if not merge_lora(llm, DTYPES[dtype]) and config.lora.rank:
        raise UserError(f"--merged: LoRA changes no weight in {dtype}: lora_B is zero, so that the "
                        "LLM was never trained, or too small; train it, or give --dtype fp32")
    write_markers(llm)
    # A base's own settings may sample, and end at another token.
    ends = {"eos_token_id": t.eos_id, "pad_token_id": t.pad_id}
    llm.config.get_text_config().update(ends)
    llm.generation_config = GenerationConfig(do_sample=False, **ends)
    llm.to(DTYPES[dtype]).save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors leaves it to the owner alone
    # The markers stay added tokens that are not special: servers leave special ones out of answers.
    t.base.save_pretrained(folder)
    (folder / "grammar").mkdir()
    for name, text in grammars(model.registry).items():
        write_text(folder / "grammar" / name, text)
    return rows


def _rows(model: Any, clips: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Rows of the parity file: each hypothesis alone, then behind its transcript each task."""
    # Without grammar and bias, which servers have not; of what listens, without its speech.
    t, collator = model.tokenizer, replace(model.collator(), listens=False)
    texts = [hypothesis for _, hypothesis in clips]
    # Servers begin a text as its tokenizer does by itself, and would begin it twice.
    begin = t.base.bos_token if t.base("")["input_ids"][:1] == [t.base.bos_token_id] else ""
    examples = [Example(Utterance(i, None, "", hypothesis=h), None) for i, h in clips]
    batch = collator.from_waves(examples, [torch.zeros(0)] * len(clips)).to(model.device)
    for task in (None, *model.registry):
        marks = [SEPARATOR, task.marker] if task else []
        heads = [[*t.text_ids(x), *map(t.marker_ids.get, marks)] if task else [] for x in texts]
        state = model.prefill(batch)
        feed(model, state, heads)
        room, ends = [min(n, 256) for n in model.fits(state, [1] * len(clips))], [[t.eos_id]]
        answers, _ = Greedy(model, state, room, ends * len(clips)).run(goes_on=False)
        for example, text, head, answer in zip(examples, texts, heads, answers, strict=True):
            said = [{"role": "user", "content": example.utterance.hypothesis}]
            said += [{"role": "assistant", "content": text + "".join(marks)}] if task else []
            ids = [*model.prefix, *collator.hypothesis_ids(example), *model.suffix, *head]
            yield {"id": example.utterance.id, "task": task and task.name, "messages": said,
                   "prompt": t.base.apply_chat_template(said, tokenize=False).removeprefix(begin),
                   "prompt_ids": ids,
                   "answer": t.base.decode(answer.ids, skip_special_tokens=True,
                                           clean_up_tokenization_spaces=False),
                   "answer_ids": answer.ids,  # below: room to go on where a server does not stop
                   "max_tokens": len(answer.ids) + 8 * (answer.ids[-1:] == [t.eos_id])}
        if task is None and model.config.transcript != "verbatim":
            texts = [t.decode(answer.ids).partition(SEPARATOR)[0] for answer in answers]


@torch.no_grad()
def _check(folder: Path, rows: Sequence[dict[str, Any]], close: float) -> int:
    """Note by how much the folder's model prefers each answer at its closest call; returns how many
    prompts' texts give other ids. UserError: it clearly prefers another answer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    llm: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for row in rows:
        # Where each token of an answer is the likeliest behind those before, it is the greedy one.
        ids, answer = row["prompt_ids"] + row["answer_ids"], torch.tensor(row["answer_ids"])
        logits = llm(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0, -len(answer):]
        best = logits.scatter(1, answer[:, None], float("-inf")).amax(-1)
        row["margin"] = round(float((logits.gather(1, answer[:, None])[:, 0] - best).min()), 4)
        if not row["margin"] >= -close:  # also where it is no number, which fp16 may not hold
            raise UserError(f"the merged model answers otherwise than the model: clip {row['id']}, "
                            f"task {row['task']}, by {-row['margin']:.3g} nats (rounding: {close});"
                            " try --dtype fp32, and please report it, with the name of the LLM")
    return sum(tokenizer(row["prompt"])["input_ids"] != row["prompt_ids"] for row in rows)
