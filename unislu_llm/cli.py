"""The console command `unislu`. A command imports what it needs when it runs: `--help` is quick."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro

from unislu_llm.errors import UserError, hint, quiet_libraries, status_of
from unislu_llm.parity import parity
from unislu_llm.run_commands import cache, compare, evaluate, serve, train, version

Commands = dict[str, Callable[..., Any]]
Manifests = Annotated[list[Path], tyro.conf.arg(metavar="MANIFEST [MANIFEST ...]",
                                                help_behavior_hint="")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 2 for bad input, else the command's."""
    quiet_libraries()
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(args or ["--help"])
    except BrokenPipeError:  # `unislu ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseException as error:
        status = status_of(error)
        if status is None:
            raise
        return status


def _run(args: list[str]) -> int:
    program = "unislu"
    about = ("Unified spoken language understanding: transcript, entities and labels from speech. "
             "`unislu --version` says which this is.")
    commands: Commands = {command.__name__: command for command in (
        predict, transcribe, prepare, validate, train, evaluate, compare, export, parity, serve,
        demo, cache)}
    if args[0] == "--version":
        print(version())
        return 0
    if args[0] == "prepare":  # has commands of its own
        about, commands = str(prepare.__doc__), prepare()
        program, args = "unislu prepare", args[1:] or ["--help"]
    name = args[0]
    if not name.startswith("-") and name not in commands:
        raise UserError(f"{program}: unknown command '{name}'{hint(name, commands)} "
                        f"Commands: {', '.join(commands)}")
    if name in ("train", "evaluate", "parity"):  # they read their flags themselves
        return commands[name](args[1:])
    if name not in commands:  # `--help`: a line for each command
        lines = {n: _named(str(c.__doc__).splitlines()[0]) for n, c in commands.items()}
        return tyro.extras.subcommand_cli_from_dict(lines, args=args, prog=program,
                                                    description=about) or 0
    if not {"-h", "--help"} & set(args):
        from unislu_llm.flags import refuse_repeats

        refuse_repeats(args, commands[name])
    # Flags keep their short names, and switches have no --no- twin.
    plain = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    return tyro.cli(commands[name], args=args[1:], prog=f"{program} {name}", config=plain) or 0


def _named(doc: str) -> Callable[..., Any]:
    def command() -> None:
        pass

    command.__doc__ = doc
    return command


def predict(model: Annotated[str, tyro.conf.arg(metavar="MODEL")],
            audio: Annotated[list[str], tyro.conf.arg(metavar="AUDIO [AUDIO ...]",
                                                      help_behavior_hint="")], /,
            tasks: tuple[str, ...] = ("all",), out: Path | None = None,
            as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
            language: str = "", recogniser: str = "", no_speech: float = 0.6,
            n_best: int = 1, num_beams: int = 1, phrases: str = "", phrase_boost: float = 2.0,
            transcript: Literal["rewrite", "verbatim"] | None = None,
            grounded: bool = False, no_grammar: bool = False, confidences: bool = False,
            precision: Literal["fp32", "bf16"] = "fp32", batch_size: int = 8) -> int:
    """Print transcript, entities and labels of audio files, as they come.

    What is over 30 s is cut at pauses into windows. Unreadable files are an error each, status 2.

    Args:
        model: Run folder (its best checkpoint), saved model, or name on the Hugging Face hub.
        audio: WAV, FLAC, Ogg, Opus, MP3: files, folders, 'clips/*.wav', or - for standard input.
        tasks: Tasks to answer; without names: transcripts alone.
        out: Write JSON lines into this new file, in place of printing.
        as_json: Print one JSON object a file, with all that is known.
        language: Whisper language code for the recogniser; default: the model's own.
        recogniser: Makes hypotheses: Whisper, a saved model, `ctranslate2:WHISPER`, a server's URL.
        no_speech: Probability of no speech above which nothing is answered; 1 answers all.
        num_beams: Beams; 1 is greedy.
        n_best: With JSON: alternatives to print, at most as many as beams.
        transcript: How a hypothesis becomes the transcript; default: the model's own way.
        phrases: File of names and terms, one a line, that are raised in transcripts.
        phrase_boost: Nats by which each token of these is raised.
        grounded: Phrases of span tasks are whole words of the transcript.
        no_grammar: Let the model write freely, malformed or not.
        confidences: With JSON: how sure the decoder is of tokens, entities and labels.
        precision: Of frozen weights; bf16 is faster on a GPU.
        batch_size: Files (or windows) decoded at one time.
    """
    for wrong, why in (  # before anything is loaded, which takes seconds
            (not audio, "no audio file is named; give one or more"),
            (not 1 <= n_best <= num_beams,
             f"--n-best {n_best} (1 or more) needs --num-beams {max(n_best, 1)} or more"),
            (grounded and no_grammar, "--grounded needs the grammar; drop --no-grammar"),
            (out and out.exists(), f"--out {out}: is there already; remove it, or give another")):
        if wrong:
            raise UserError(why)
    from unislu_llm.config import DecodeConfig
    from unislu_llm.config_file import check
    from unislu_llm.decoding import files
    from unislu_llm.run_folder import find_run, load_model
    run = find_run(model)
    registry, every = run.registry(), tasks == ("all",)  # unknown tasks are told before loading
    names = [registry[name].name for name in (registry.names if every else dict.fromkeys(tasks))]
    options = check(DecodeConfig, {
        "batch_size": batch_size, "num_beams": num_beams, "no_speech": no_speech,
        "transcript": transcript, "grounded": grounded, "force_task": True,
        "phrases": phrases, "phrase_boost": phrase_boost, "grammar": not no_grammar},
        lambda place: f"--{place[0]}".replace("_", "-"))
    load, paths = partial(load_model, run, precision), list(files.find_files(audio))
    answers = files.answer_files(load, paths, names, options, n_best=n_best,
                                 language=language or None, recogniser=recogniser)
    show = partial(files.as_json, confidences=confidences) if as_json or out else files.as_text
    return 2 if files.write_answers(answers, len(paths), show, out) else 0


def demo(model: Annotated[str, tyro.conf.arg(metavar="MODEL")],
         other: Annotated[str, tyro.conf.arg(metavar="[MODEL2]")] = "", /,
         host: str = "127.0.0.1", port: int | None = None) -> None:
    """Show a page in the browser to try a model, or two beside each other; it works offline.

    Args:
        model: Run folder (its best checkpoint), saved model, or name on the Hugging Face hub.
        other: The same.
        host: Address to listen at; one that others can reach needs a password in UNISLU_TOKEN.
        port: Port to listen at; default: the first free one from 7860.
    """
    from unislu_llm.demo import serve

    serve([model, other] if other else [model], host, port)


def transcribe(model: Annotated[str, tyro.conf.arg(metavar="MODEL_OR_CHECKPOINT")],
               manifests: Manifests, /, out: Path, source: Literal["decoder", "ctc"] = "decoder",
               language: str = "en", tasks_file: Path | None = None, num_beams: int = 1,
               copy_text: bool = False, pseudo_label: bool = False, phrases: Path | None = None,
               phrase_boost: float = 2.0, precision: Literal["fp32", "bf16"] = "fp32",
               batch_size: int = 8) -> None:
    """Write copies of manifests whose rows have a hypothesis: what a recogniser makes of them.

    It can be stopped and started again. Rows over 30 s, and without --copy-text those without
    audio, are copied as they are.

    Args:
        model: Whisper or a saved model, by folder or name on the hub; or a run folder; or
            `ctranslate2:CHECKPOINT`; or the URL of a server with OpenAI's API, up to `/v1`.
        manifests: JSON-lines files.
        out: Folder of the copies; a call that is stopped goes on from what it made.
        source: Of a saved model: its decoder's transcript, or the greedy text of its ctc projector.
        language: Whisper language code of rows that name none.
        tasks_file: YAML list of tasks (data.tasks of a config); default: entities, sentiment.
        copy_text: Rows without audio get their own transcript as hypothesis.
        pseudo_label: Rows with audio that lack `text` get the transcript as `text`, and no row gets
            a hypothesis. Those that are empty, repeat themselves or are over 30 s are left out.
        phrases: File of names and terms, one a line, that are raised in what is recognised.
        phrase_boost: Nats by which each token of these is raised.
        precision: Of the recogniser; bf16 is several times faster on a GPU.
        batch_size: Clips at one time.
        num_beams: Beams; 1 is greedy.
    """
    if not manifests or min(batch_size, num_beams) < 1:
        raise UserError("name a manifest, and a --batch-size and --num-beams of 1 or more")
    if pseudo_label and copy_text:
        raise UserError("--pseudo-label writes transcripts and --copy-text hypotheses; call it "
                        "twice, the second time on the copies")
    from tabulate import tabulate

    from unislu_llm.decoding.phrases import Phrases
    from unislu_llm.decoding.transcribe import transcribe
    from unislu_llm.run_folder import find_run, is_run
    from unislu_llm.scoring.wer import corpus_wer, rate_of
    from unislu_llm.tasks import TaskRegistry

    run = find_run(model) if is_run(Path(model)) else None
    reports = transcribe(str(run.model) if run else model, manifests, out,
                         TaskRegistry.from_yaml(tasks_file), source=source, language=language,
                         copy_text=copy_text, pseudo_label=pseudo_label, precision=precision,
                         phrases=Phrases.of(phrases, phrase_boost),
                         name=run.name if run else "", batch_size=batch_size, num_beams=num_beams)
    table = []
    for r in reports:
        parts = {n: r.counts[n] for n in ("rows", "made", "known", "looped", "no_speech", "copied",
                                          "filled")}
        texts, made, codes = zip(*r.pairs, strict=True) if r.pairs else ((), (), ())
        codes = tuple(code or language for code in codes)
        wer = f"{corpus_wer(texts, made, 'whisper', codes).wer:.1f}" if r.pairs else "-"
        table.append({"manifest": str(r.copy), **parts, rate_of(codes).upper(): wer})
        if n := r.counts["mute"]:
            print(f"{r.copy}: {n} rows have no audio and no hypothesis; --copy-text gives them one")
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
        tasks_file: YAML list of tasks (data.tasks of a config); default: entities, sentiment.
        audio: none believes the manifest, header opens each file, full decodes the samples.
        fix: Write rows, mended, without errors to this file (several manifests: to this folder).
        strict: Exit with status 1 also for warnings.
        max_warnings: Warnings of one kind that are shown for a file.
    """
    from unislu_llm.data.validate import validate

    report = validate(manifests, tasks_file=tasks_file, audio=audio, fix=fix)
    print(report.page(max_warnings))
    return report.status(strict)


def prepare() -> Commands:
    """Write the manifest of a corpus, from the layout that it has."""
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


def export(run: Annotated[str, tyro.conf.arg(metavar="RUN")], /, out: Path,
           dtype: Literal["fp32", "bf16", "fp16"] = "bf16", licence: str = "",
           results: tuple[Path, ...] = (), data_note: Path | None = None, encoder: str = "",
           llm: str = "", recogniser: str = "", no_check: bool = False, lora_scale: float = 1.0,
           lora_rank: int = 0, push: Annotated[str, tyro.conf.arg(metavar="USER/MODEL")] = "",
           private: bool = False, revision: str = "", merged: bool = False,
           manifest: tuple[Path, ...] = ()) -> None:
    """Write a folder with the trained weights of a run, its configuration and a model card.

    It is used like any saved model. An earlier export in the folder is replaced.

    Args:
        run: Run folder of a training recipe, or its `best` or `last`; with --merged any model.
        out: Folder to write.
        dtype: Of the stored weights; they are loaded as fp32.
        licence: SPDX identifier of the weights' licence.
        results: Score files of `unislu evaluate`, of this checkpoint or its export.
        data_note: File that says what the training data is, and its licence.
        encoder: Public name of the encoder's checkpoint, where the run names a folder.
        llm: The same of the LLM.
        recogniser: The same of what makes hypotheses.
        no_check: Do not load the model to compare it with the original.
        push: Publish the folder on the Hugging Face hub under this name, which then loads it.
        private: With --push: make the repository private.
        revision: With --push: branch to publish on, made where it is lacking.
        merged: Write LLM or Whisper, LoRA merged, as a plain checkpoint for servers and recipes.
        manifest: With --merged: rows whose hypotheses are parity prompts; default: the mini corpus.
        lora_scale: Share of LoRA's update that is kept; below 1, less of the base is forgotten.
        lora_rank: Directions of each LoRA update that are kept, for smaller files; 0: all.
    """
    if (private or revision) and not push:
        raise UserError("--private and --revision are of what is published; add --push USER/MODEL")
    if manifest if not merged else any((
            results, data_note, encoder, llm, recogniser, no_check, lora_scale != 1, lora_rank)):
        raise UserError("--merged takes --out, --dtype, --licence, --push, and alone --manifest")
    from unislu_llm.export import PUBLISHED, export
    from unislu_llm.weights.publish import check_login, publish

    name = push + (f"@{revision}" if revision else "")
    if push:  # before the work
        check_login(push)
    if merged:
        from unislu_llm.merge import merge
        print(merge(run, out, dtype=dtype, licence=licence, manifests=manifest, published=name),
              end="")
    else:
        size, difference = export(
            run, out, dtype=dtype, licence=licence, results=results, data_note=data_note,
            names={"encoder": encoder, "llm": llm, "recogniser": recogniser}, check=not no_check,
            published=name, lora_scale=lora_scale, lora_rank=lora_rank)
        print(f"{out}: {size / 1e6:.2f} MB in {dtype}")
        if difference is not None:
            print(f"largest difference of a token's loss from the original: {difference:.3g} nats "
                  "(fine: 0 in fp32, below 0.05 in fp16, 0.5 in bf16; else give a finer --dtype)")
    if not licence:
        print("the card names no licence, so nobody may use the weights; add --licence Apache-2.0")
    if push:
        files = ["*"] if merged else PUBLISHED
        print(f"published as {name}: "
              f"{publish(out, push, files, private=private, branch=revision)}")


if __name__ == "__main__":
    raise SystemExit(main())
