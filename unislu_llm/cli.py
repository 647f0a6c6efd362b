"""The console command `unislu`. A command imports what it needs when it runs: `--help` is quick."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import tyro

from unislu_llm.errors import UserError, hint

if TYPE_CHECKING:
    from unislu_llm.decoding.answer import Answer

Commands = dict[str, Callable[..., Any]]
Manifests = Annotated[list[Path], tyro.conf.arg(metavar="MANIFEST [MANIFEST ...]")]

_CHUNK = 64  # files answered together: enough for batches of like length, soon enough for people


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 2 for bad input, else the command's."""
    # The tokenizer's threads do not survive a fork, and it warns at every one.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    args, program = list(sys.argv[1:] if argv is None else argv), "unislu"
    about = "Unified spoken language understanding: transcript, entities and labels from speech."
    commands: Commands = {command.__name__: command for command in (
        predict, transcribe, validate, prepare, cache, export)}
    if args[:1] == ["--version"]:
        from importlib.metadata import version

        print(f"unislu_llm {version('unislu_llm')}")
        return 0
    try:
        if args[:1] == ["prepare"]:  # has commands of its own
            about, commands = str(prepare.__doc__), prepare()
            program, args = "unislu prepare", args[1:]
        args = args or ["--help"]
        if not args[0].startswith("-") and args[0] not in commands:
            raise UserError(f"{program}: unknown command '{args[0]}'{hint(args[0], commands)} "
                            f"Commands: {', '.join(commands)}")
        # Flags keep their short names, and switches have no --no- twin.
        plain = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
        status = tyro.extras.subcommand_cli_from_dict(commands, args=args, prog=program,
                                                      description=about, config=plain)
    except UserError as error:
        return _fail(error)
    except BrokenPipeError:  # `unislu ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status or 0


def _fail(error: object) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 2


def predict(model: Annotated[Path, tyro.conf.arg(metavar="MODEL")],
            audio: Annotated[list[Path], tyro.conf.arg(metavar="AUDIO [AUDIO ...]")], /,
            tasks: tuple[str, ...] = ("all",),
            as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
            long_form: bool = False, overlap: float = 0.0, num_beams: int = 1, n_best: int = 1,
            transcript: Literal["rewrite", "margin", "verbatim"] | None = None,
            grounded: bool = False, no_grammar: bool = False, confidences: bool = False,
            batch_size: int = 8) -> int:
    """Print transcript, entities and labels of audio files.

    A file that cannot be read is one error; the others are answered, and the exit status is 2.

    Args:
        model: Folder of a saved model, or a run folder (its best checkpoint).
        audio: WAV, FLAC, Ogg, Opus, MP3; any rate, mixed down to mono.
        tasks: Tasks to answer; without names: transcripts alone.
        as_json: Print one JSON object a file, with all that is known.
        long_form: Cut files over 30 s at pauses into windows, and join their answers.
        overlap: Seconds by which windows overlap.
        num_beams: Beams; 1 is greedy.
        n_best: With --json: alternatives to print, at most as many as beams.
        transcript: How a hypothesis becomes the transcript; default: the model's own way.
        grounded: Phrases of span tasks are whole words of the transcript.
        no_grammar: Let the model write freely, malformed or not.
        confidences: With --json: how sure the decoder is of tokens, entities and labels.
        batch_size: Files (or windows) decoded at one time.
    """
    if not audio:  # before anything is loaded, which takes seconds
        raise UserError("no audio file is named; give one or more")
    if not 1 <= n_best <= num_beams:
        raise UserError(f"--n-best {n_best} (1 or more) needs --num-beams {max(n_best, 1)} or more")
    if grounded and no_grammar:
        raise UserError("--grounded needs the grammar; drop --no-grammar")
    if overlap and not long_form:
        raise UserError("--overlap is that of windows; add --long-form")
    from unislu_llm.config import DecodeConfig
    from unislu_llm.config_file import check
    from unislu_llm.decoding.predict import understand
    from unislu_llm.run_folder import find_run, load_model

    run = find_run(model)
    names = list(run.registry().names if tasks == ("all",) else dict.fromkeys(tasks))
    for name in names:
        run.registry()[name]  # an unknown task is named before the model is loaded
    options = check(DecodeConfig, {
        "batch_size": batch_size, "num_beams": num_beams, "transcript": transcript,
        "grounded": grounded, "force_task": True, "grammar": not no_grammar},
        lambda place: f"--{place[0]}".replace("_", "-"))
    loaded, failed = None, 0
    for start in range(0, len(audio), _CHUNK):
        good = list(_readable(audio[start:start + _CHUNK], long_form))
        failed += len(audio[start:start + _CHUNK]) - len(good)
        if good:
            loaded = loaded or load_model(run)
            answers = understand(loaded, good, names, options, n_best=n_best, long_form=long_form,
                                 overlap=overlap)
            for file, answer in zip(good, answers, strict=True):
                print(_json(file, answer, confidences) if as_json else _lines(file, answer),
                      flush=True)
    return 2 if failed else 0


def _readable(files: Sequence[Path], any_length: bool) -> Iterator[Path]:
    """The files that can be decoded; of each other, an error is printed."""
    from unislu_llm.data import audio

    for file in files:
        try:
            # Read twice, here and to be decoded: one bad file must not end a batch of good ones.
            seconds = len(audio.load(file)) / audio.SAMPLE_RATE
            if not any_length and seconds > audio.MAX_SECONDS:
                raise UserError(f"{file}: {seconds:.2f} s is longer than the limit of "
                                f"{audio.MAX_SECONDS:g} s; add --long-form, or cut the file")
            yield file
        except UserError as error:
            _fail(error)


def _json(file: Path, answer: Answer, confidences: bool) -> str:
    values = {"file": str(file), **answer.to_dict()}
    for part in () if confidences else (values, *values.get("windows", ())):
        part.pop("confidence", None)
    return json.dumps(values, ensure_ascii=False)


def _lines(file: Path, answer: Answer) -> str:
    """An answer for people."""
    values = answer.to_dict()
    lines = [str(file), f"  text: {_printable(answer.transcript)}"]
    for name in answer.outputs:
        value = values[name]
        # Where the words of a phrase could be found in the audio, its seconds are told as well.
        if value is not None and name in answer.spans:
            value = [f"{s['label']}: {s['phrase']} ({s['start_seconds']:.1f}-"
                     f"{s['end_seconds']:.1f} s)" for s in answer.spans[name]]
        if isinstance(value, list):
            value = "; ".join(v if isinstance(v, str) else ": ".join(v) for v in value) or "none"
        lines.append(f"  {name}: {_printable(value or 'no usable answer')}")
    if values["problems"]:
        lines.append(f"  malformed: {', '.join(values['problems'])}")
    return "\n".join(lines)


def _printable(text: str) -> str:
    # Byte-level models can emit any character, and some of them steer a terminal.
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def transcribe(model: Annotated[str, tyro.conf.arg(metavar="MODEL_OR_CHECKPOINT")],
               manifests: Manifests, /, out: Path, source: Literal["decoder", "ctc"] = "decoder",
               language: str = "en", tasks_file: Path | None = None, copy_text: bool = False,
               pseudo_label: bool = False, precision: Literal["fp32", "bf16"] = "fp32",
               batch_size: int = 8) -> None:
    """Write copies of manifests whose rows have a hypothesis: what a recogniser makes of them.

    It can be stopped and started again. Rows over 30 s, and without --copy-text those without
    audio, are copied as they are.

    Args:
        model: Whisper checkpoint (name or folder), or run folder or folder of a saved model.
        manifests: JSON-lines files.
        out: Folder of the copies; a call that is stopped goes on from what it made.
        source: Of a saved model: its decoder's transcript, or the greedy text of its ctc projector.
        language: Whisper language code of rows that name none.
        tasks_file: YAML list of tasks; default: named entities and sentiment.
        copy_text: Rows without audio get their own transcript as hypothesis.
        pseudo_label: Rows with audio that lack `text` get the transcript as `text`, and no row gets
            a hypothesis. Those that are empty, repeat themselves or are over 30 s are left out.
        precision: Of the recogniser; bf16 is several times faster on a GPU.
        batch_size: Clips at one time.
    """
    if not manifests or batch_size < 1:
        raise UserError("name a manifest, and a --batch-size of 1 or more")
    if pseudo_label and copy_text:
        raise UserError("--pseudo-label writes transcripts and --copy-text hypotheses; call it "
                        "twice, the second time on the copies")
    from tabulate import tabulate

    from unislu_llm.decoding.transcribe import transcribe
    from unislu_llm.run_folder import find_run, is_run
    from unislu_llm.scoring.wer import corpus_wer
    from unislu_llm.tasks import TaskRegistry

    run = find_run(model) if is_run(Path(model)) else None
    reports = transcribe(str(run.model) if run else model, manifests, out,
                         TaskRegistry.from_yaml(tasks_file), source=source, language=language,
                         copy_text=copy_text, pseudo_label=pseudo_label, precision=precision,
                         name=run.name if run else "", batch_size=batch_size)
    table = []
    for r in reports:
        parts = {n: r.counts[n] for n in ("rows", "made", "known", "looped", "copied", "filled")}
        texts, made = zip(*r.pairs, strict=True) if r.pairs else ((), ())
        wer = f"{corpus_wer(texts, made, 'whisper').wer:.1f}" if r.pairs else "-"
        table.append({"manifest": str(r.copy), **parts, "WER": wer})
        for what, places in r.left_out.items():
            print(f"left out ({what}): {len(places)}, e.g. {', '.join(places[:10])}")
    print(tabulate(table, headers="keys", disable_numparse=True))


def validate(manifests: Manifests, /, tasks_file: Path | None = None,
             audio: Literal["none", "header", "full"] = "header", fix: Path | None = None,
             strict: bool = False, max_warnings: int = 10) -> int:
    """Check manifests: every problem as file:line: field: message, then what is in them.

    The exit status is 1 where rows cannot be trained on, 2 where a manifest cannot be read, else 0.

    Args:
        manifests: JSON-lines files; ids, texts and audio in two of them are found.
        tasks_file: YAML list of tasks; default: named entities and sentiment.
        audio: none believes the manifest, header opens each file, full decodes the samples.
        fix: Write the rows without errors to this file (several manifests: into this folder).
        strict: Exit with status 1 also for warnings.
        max_warnings: Warnings of one kind that are shown for a file.
    """
    from unislu_llm.data.validate import validate

    report = validate(manifests, tasks_file=tasks_file, audio=audio, fix=fix)
    print(report.page(max_warnings))
    return report.status(strict)


def prepare() -> Commands:
    """Write the manifest of a corpus: slue-voxpopuli, slue-voxceleb, slue-hub, conll, csv."""
    from unislu_llm.data.corpora import SOURCES, prepare

    def command(source: type[Any]) -> Callable[..., None]:
        def run(*args: Any, **options: Any) -> None:
            print(prepare(*args, **options))

        # To the parser it is `prepare` with a source of this type, whose fields are flags as well.
        fields = {"source": Annotated[source, tyro.conf.arg(name="")]}
        run.__annotations__ = get_type_hints(prepare) | fields
        run.__signature__ = inspect.signature(prepare)  # type: ignore[attr-defined]
        flags = str(inspect.getdoc(prepare)).partition("Args:")[2]
        run.__doc__ = f"{str(source.__doc__).splitlines()[0]}\n\nArgs:{flags}"
        return run

    return {name: command(source) for name, source in SOURCES.items()}


def cache(source: Annotated[Path, tyro.conf.arg(metavar="RUN_OR_CONFIG")], /,
          folder: Path | None = None, kind: Literal["speech_llm", "whisper_slu"] = "speech_llm"
          ) -> None:
    """Store the encoder frames of a run's training clips, which training would compute first.

    It can be stopped and started again, and runs where the training's GPU is not needed yet.

    Args:
        source: Run folder, or config file of a recipe.
        folder: Of the cache; default: data.frame_cache of the config.
        kind: Decoder it is for; with bf16 alone, LLM and Whisper runs have other frames.
    """
    import torch
    from transformers import WhisperModel

    from unislu_llm.config_file import config_from_file
    from unislu_llm.data.frame_cache import FrameCache, build_frames, encoder_settings
    from unislu_llm.data.loading import load_examples
    from unislu_llm.models.encoder import SpeechEncoder
    from unislu_llm.training.build import build_registry
    from unislu_llm.weights import resolve

    run = source / "config.yaml"  # its paths are as the run was given them
    config = config_from_file(run, resolve=False) if run.is_file() else config_from_file(source)
    model, data, precision = config.model, config.data, config.train.precision
    if not (home := folder or data.frame_cache):
        raise UserError(f"{source} names no data.frame_cache; give --folder")
    examples = load_examples(data.train, build_registry(config))
    clips = [example.utterance for example in examples]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    whisper: Any = WhisperModel.from_pretrained(resolve(model.encoder).path, dtype=torch.float32,
                                                attn_implementation="sdpa")
    # As the models build their encoders: frames of another dtype would not be found again.
    half = precision == "bf16" and kind == "speech_llm"
    encoder = SpeechEncoder(whisper.encoder.to(torch.bfloat16 if half else torch.float32),
                            model).eval().to(device)
    stored = build_frames(FrameCache(home, encoder_settings(encoder, precision)), encoder, clips,
                          device=device, progress="encode")
    print(f"{stored} clips stored")


def export(run: Annotated[Path, tyro.conf.arg(metavar="RUN")], /, out: Path,
           dtype: Literal["fp32", "bf16", "fp16"] = "bf16", licence: str = "",
           results: tuple[Path, ...] = (), data_note: Path | None = None, encoder: str = "",
           llm: str = "", recogniser: str = "", no_check: bool = False) -> None:
    """Write a folder with the trained weights of a run, its configuration and a model card.

    It is used like any saved model. An earlier export in the folder is replaced.

    Args:
        run: Run folder of a training recipe, or its `best` or `last`.
        out: Folder to write.
        dtype: Of the stored weights; they are loaded as fp32.
        licence: SPDX identifier of the weights' licence.
        results: Score files of eval/evaluate.py, of this checkpoint or its export.
        data_note: File that says what the training data is, and its licence.
        encoder: Public name of the encoder's checkpoint, where the run names a folder.
        llm: The same of the LLM.
        recogniser: The same of what makes hypotheses.
        no_check: Do not load the model to compare it with the original.
    """
    from unislu_llm.export import export

    size, difference = export(
        run, out, dtype=dtype, licence=licence, results=results, data_note=data_note,
        names={"encoder": encoder, "llm": llm, "recogniser": recogniser}, check=not no_check)
    print(f"{out}: {size / 1e6:.2f} MB in {dtype}")
    if difference is not None:
        print(f"largest difference of a token's loss from the original: {difference:.3g} nats")


if __name__ == "__main__":
    raise SystemExit(main())
