"""`unislu demo`: a page to try models: record or choose a clip, read the answers.

It asks nothing of other machines. What models and files say is shown as text, never as HTML.
"""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from unislu_llm.config_file import shipped
from unislu_llm.data.phrases import place_phrases
from unislu_llm.decoding.answer import Answer
from unislu_llm.decoding.predict import understand
from unislu_llm.errors import UserError, shorten
from unislu_llm.io import read_json_lines
from unislu_llm.models.base import SLUModel
from unislu_llm.run_folder import load
from unislu_llm.tasks import LabelTask, SpanTask


def segments(text: str, phrases: Sequence[tuple[str, str]], language: str = "",
             ) -> tuple[list[tuple[str, str | None]], list[str]]:
    """A transcript as pieces `(text, label or None)`, and, as `LABEL: phrase`, what has no place of
    its own in it: it is not said so often, or overlaps a longer one."""
    spans, lost = place_phrases(text, phrases, first=True, language=language)
    missing = [phrases[i] for i in sorted(lost)]
    once = list(dict.fromkeys(missing))  # what is given more often than said is marked once
    spans, lost = place_phrases(text, once, spans, first=True, language=language)
    for i in set(range(len(once))) - set(lost):
        missing.remove(once[i])
    pieces, at = list[tuple[str, str | None]](), 0
    for label, start, end in [*spans, ("", len(text), len(text))]:
        pieces += [(text[at:start], None), (text[start:end], label)]
        at = end
    return [p for p in pieces if p[0]], [f"{label}: {phrase}" for label, phrase in missing]


def label_shares(answer: Answer, task: str) -> dict[str, float] | str:
    """Probabilities of a task's labels; where there are none, the labels alone."""
    value: Any = answer.outputs.get(task)
    text = value if isinstance(value, str) else ", ".join(value or ()) or "none"
    return answer.probabilities.get(task) or text


def shown(model: SLUModel, answer: Answer) -> list[Any]:
    """What is shown: transcript, labels of each label task, notes, and all that is known."""
    given: Any = [pair for task in model.registry if isinstance(task, SpanTask)
                  for pair in answer.outputs[task.name] or ()]
    pieces, lost = segments(answer.transcript, given, model.config.language)
    labels = [label_shares(answer, t.name) for t in model.registry if isinstance(t, LabelTask)]
    known = answer.to_dict()
    notes = ["no speech"] * answer.no_speech + [f"warning: {w}" for w in answer.warnings]
    notes += [f"not marked: {p}" for p in lost] + [f"malformed: {p}" for p in known["problems"]]
    return [pieces, *labels, "\n".join(notes), known]


def page(models: Mapping[str, SLUModel]) -> Any:
    """The page (`gradio.Blocks`) for loaded models, by the names that it shows."""
    import gradio as gr

    def answer(model: SLUModel, clip: str | None, phrases: str = "") -> list[Any]:
        words = [phrase for line in phrases.splitlines() if (phrase := line.strip())]
        try:
            if not clip:
                raise UserError("record a clip, or choose a file or an example")
            return shown(model, understand(model, clip, phrases=words))
        except UserError as error:
            # The file is known by its name; it lies in a temporary folder. Errors are read as HTML.
            why = html.escape(str(error).replace(f"{Path(clip or '').parent}{os.sep}", ""))
            raise gr.Error(why, title="No answer", print_exception=False) from None

    with gr.Blocks(title="unislu: understand speech", analytics_enabled=False) as blocks:
        gr.HTML("<h1>Understand speech</h1>")
        inputs: list[Any] = [gr.Audio(label="Clip", sources=["microphone", "upload"],
                                      type="filepath", buttons=[])]
        inputs.append(gr.Textbox("", label="Names and terms that may be said, one a line", lines=2))
        folder = shipped() / "recipes" / "data" / "mini"
        if clips := {str(folder / row["audio"]): shorten(row["text"])
                     for manifest in sorted(folder.glob("*_dev.jsonl"))
                     for row in read_json_lines(manifest)[:3]}:
            gr.Examples([[clip] for clip in clips], inputs[:1], label="Examples",
                        example_labels=list(clips.values()), api_visibility="private")
        button = gr.Button("Understand", variant="primary")
        with gr.Row():
            for i, (name, model) in enumerate(models.items(), 1):
                with gr.Column(min_width=300):
                    gr.HTML(f"<h2>{html.escape(name)}</h2>")
                    outputs: list[Any] = [gr.HighlightedText(label="Transcript")]
                    outputs += [gr.Label(label=task.meaning(task.marker))
                                for task in model.registry if isinstance(task, LabelTask)]
                    outputs.append(gr.Textbox(label="Notes", lines=1, max_lines=8))
                    with gr.Accordion("All that is known", open=False):
                        outputs.append(gr.JSON(label="Answer", show_label=False))
                # One call at a time: models are not made for several, and share the processor.
                button.click(partial(answer, model), inputs, outputs, concurrency_limit=1,
                             concurrency_id="model", api_name=f"understand_{i}")
    return blocks.queue(max_size=32)


def serve(names: Sequence[str], host: str, port: int | None) -> None:
    """Show the page until Ctrl-C; raises UserError: it cannot be shown, or others could come in."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'unislu_llm[demo]'") from None
    password = os.environ.get("UNISLU_TOKEN")
    if host not in ("127.0.0.1", "localhost", "::1") and not password:
        raise UserError(f"--host {host} lets others in: set UNISLU_TOKEN, the password of the user "
                        "'unislu'; or leave --host out")
    models = {names[0]: load(names[0])}
    blocks = page(models | {name: load(name, base=models[names[0]]) for name in names[1:]})
    try:
        # All that lets others in is said here, whatever GRADIO_SHARE and its like say.
        blocks.launch(server_name=host, server_port=port, share=False, quiet=True, pwa=False,
                      auth=("unislu", password) if password else None, ssr_mode=False,
                      mcp_server=False, enable_monitoring=False, footer_links=[],
                      max_file_size="200mb", prevent_thread_lock=True)
    except OSError as error:
        raise UserError(f"--host {host}: {str(error).split('. ')[0]}") from error
    print(f"{blocks.local_url} (Ctrl-C ends it)", flush=True)
    blocks.block_thread()
