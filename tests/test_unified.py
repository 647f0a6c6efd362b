"""Encode and parse are each other's inverse; parse names every malformation and never raises."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import unified_string
from unislu_llm.errors import UserError
from unislu_llm.loss import ASR_PART, TASK_PART
from unislu_llm.tasks import ASR, NER, SA, LabelTask, Span, SpanTask, Task, TaskRegistry
from unislu_llm.tokenizer import Example, UnifiedTokenizer
from unislu_llm.unified import PROBLEMS, Parsed, encode, find_marker, parse, reference_output
from unislu_llm.utterance import Utterance

REGISTRY = TaskRegistry()
ACTS = LabelTask("acts", "[DA]", ("yes", "no", "thank you"), "[A]", "[/A]", multi=True)
WITH_ACTS = TaskRegistry([NER, SA, ACTS])
DECODERS_OWN = {"no_end", "loop"}  # counted where tokens are seen; parse sees text


CHARACTERS = st.one_of(st.sampled_from("ab Z'.,[]/-é東🙂"),
                       st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")))
IDENTIFIERS = st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9_/-]{0,5}", fullmatch=True).filter(
    lambda name: name != "T/L")


@st.composite
def registries(draw: st.DrawFn) -> TaskRegistry:
    """One to three tasks of any kind, with any markers and labels that the registry takes."""
    names = iter(draw(st.lists(IDENTIFIERS, min_size=15, max_size=15, unique=True)))
    label = st.text(CHARACTERS, min_size=1, max_size=8).map(str.strip).filter(
        lambda text: text and not re.search(r"\[/?[A-Za-z0-9_/-]+\]", text))
    tasks: list[Task] = []
    for i in range(draw(st.integers(1, 3))):
        marker = f"[{next(names)}]"
        if draw(st.booleans()):
            tasks.append(SpanTask(f"t{i}", marker,
                                  tuple(next(names) for _ in range(draw(st.integers(1, 4))))))
        else:
            labels = tuple(draw(st.lists(label, min_size=1, max_size=4, unique=True)))
            name = next(names)
            tasks.append(LabelTask(f"t{i}", marker, labels, f"[{name}]", f"[/{name}]",
                                   multi=draw(st.booleans())))
    return TaskRegistry(tasks)


@st.composite
def annotated(draw: st.DrawFn, registry: TaskRegistry) -> Utterance:
    """A valid utterance with all tasks annotated; spans in any order, overlapping, repeated."""
    text = draw(st.text(CHARACTERS, max_size=40)
                .map(str.strip)
                .filter(lambda t: find_marker(t, registry) is None))
    starts = [i for i, c in enumerate(text) if not c.isspace()]
    labels: dict[str, Any] = {}
    for task in registry:
        if isinstance(task, SpanTask):
            spans = []
            for _ in range(draw(st.integers(0, 4)) if starts else 0):
                start = draw(st.sampled_from(starts))
                end = draw(st.sampled_from([i for i in starts if i >= start])) + 1
                spans.append(Span(draw(st.sampled_from(task.labels)), start, end))
            labels[task.name] = tuple(spans)
        elif task.multi:
            labels[task.name] = tuple(draw(st.lists(st.sampled_from(task.labels), unique=True)))
        else:
            labels[task.name] = draw(st.sampled_from(task.labels))
    return Utterance("u", None, text, labels)


def said(task: Task, utterance: Utterance) -> Any:
    """The annotation without offsets, written out independently of the library."""
    value: Any = utterance.labels[task.name]
    if isinstance(task, SpanTask):
        return tuple((s.label, utterance.text[s.start : s.end])
                     for s in sorted(value, key=lambda s: (s.start, s.end)))
    return tuple(label for label in task.labels if label in value) if task.multi else value


def test_the_strings_of_the_paper() -> None:
    text = "the council of europe met"
    u = Utterance("u", None, text,
                  {"ner": (Span("PLACE", 15, 21), Span("ORG", 4, 11)), "sa": "Positive"})
    assert unified_string(u, NER) == text + "[T/L][NER][ORG]council[/ORG][PLACE]europe[/PLACE]"
    assert unified_string(u, SA) == text + "[T/L][SA][S]Positive[/S]"
    assert unified_string(u, None) == text
    assert unified_string(Utterance("u", None, text, {"ner": ()}), NER) == text + "[T/L][NER]"


def test_a_transcript_keeps_its_punctuation() -> None:
    text = "yes, of course: it's 5 o'clock."
    u = Utterance("u", None, text, {"ner": (Span("WHEN", 21, 31),)})
    assert unified_string(u, NER) == text + "[T/L][NER][WHEN]5 o'clock.[/WHEN]"


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_parse_is_the_inverse_of_encode(data: st.DataObject) -> None:
    registry = data.draw(registries())
    utterance = data.draw(annotated(registry))
    for task in registry:
        parsed = parse(unified_string(utterance, task), registry, task.name)
        assert parsed == Parsed(utterance.text, task.name, said(task, utterance))
        assert reference_output(utterance, task) == said(task, utterance)
        # Without being told the task.
        assert parse(unified_string(utterance, task), registry) == parsed
    assert parse(unified_string(utterance, None), registry, ASR) == Parsed(utterance.text)


@settings(deadline=None, max_examples=50)
@given(annotated(WITH_ACTS))
def test_the_separator_and_the_control_token_belong_to_the_transcript(utterance: Utterance) -> None:
    for task in WITH_ACTS:
        pieces = encode(utterance, task)
        first = next(i for i, piece in enumerate(pieces) if piece.marker)
        assert [p.text for p in pieces[first:first + 2]] == ["[T/L]", task.marker]
        assert all(p.part == "asr" for p in pieces[:first + 2])
        assert all(p.part == "task" for p in pieces[first + 2:])
        assert all(p.marker == (p.text in WITH_ACTS.markers) for p in pieces)
        assert all(p.text for p in pieces)
    assert all(p.part == "asr" for p in encode(utterance, None))


def test_no_entity_leaves_the_end_of_text_alone_in_the_task_part(
    tiny_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = UnifiedTokenizer(tiny_tokenizer(), REGISTRY)
    u = Utterance("u", None, "the council met", {"ner": (), "sa": "Neutral"})
    words = tokenizer.text_ids(u.text)
    empty = tokenizer.target(Example(u, "ner"))
    assert empty.ids == (*words, tokenizer.marker_ids["[T/L]"], tokenizer.marker_ids["[NER]"],
                         tokenizer.eos_id)
    assert empty.parts == (*[ASR_PART] * (len(words) + 2), TASK_PART)
    label = tokenizer.text_ids("Neutral")
    sentiment = tokenizer.target(Example(u, "sa"))
    assert sentiment.parts == (*[ASR_PART] * (len(words) + 2), *[TASK_PART] * (len(label) + 3))
    bare = tokenizer.target(Example(u, None))
    assert bare.ids == (*words, tokenizer.eos_id)
    assert set(bare.parts) == {ASR_PART}


@pytest.mark.parametrize(("task", "labels", "message"), [
    (SA, {"ner": ()}, "'sa' is not annotated"),
    (NER, {"ner": (Span("PLCE", 0, 3),)}, "'PLCE' is not one of PLACE"),
    (NER, {"ner": (Span("PLACE", 0, 99),)}, r"0\.\.99 does not fit the text of 11 characters"),
    (NER, {"ner": (Span("PLACE", -3, 2),)}, "does not fit"),
    (NER, {"ner": (Span("PLACE", 3, 3),)}, "does not fit"),
    (NER, {"ner": (Span("PLACE", 3, 4),)}, "does not fit"),  # a blank
    (SA, {"sa": "positive"}, "must be one label of Positive, Neutral, Negative"),
    (SA, {"sa": ()}, "must be one label"),
    (SA, {"sa": ("Positive", "Neutral")}, "must be one label"),
    (ACTS, {"acts": ("yes", "maybe")}, "must be labels of yes, no, thank you"),
    (ACTS, {"acts": ("yes", "yes")}, "twice")])
def test_what_does_not_fit_is_named_with_its_row(task: Task, labels: dict[str, Any],
                                                 message: str) -> None:
    with pytest.raises(UserError, match=f"m.jsonl:7.*{message}"):
        encode(Utterance("u", None, "the council", labels, source="m.jsonl:7"), task)


def test_find_marker_finds_a_marker_in_a_transcript() -> None:
    assert find_marker("he said [NER] aloud", REGISTRY) == "[NER]"
    assert find_marker("he said[/S]aloud", REGISTRY) == "[/S]"
    assert find_marker("he said [DA] aloud [sa] ner T/L", REGISTRY) is None


MALFORMED: list[tuple[str, str | None, Any, tuple[str, ...]]] = [
    # text, task asked for, outputs that are kept, problems
    ("a bare transcript", "ner", None, ("missing_separator",)),
    ("", "sa", None, ("missing_separator",)),
    ("a b[T/L]", "ner", None, ("missing_task",)),
    ("a b[T/L]ORG", "ner", None, ("missing_task",)),
    ("a b[T/L][ORG]a[/ORG]", "ner", None, ("missing_task",)),
    ("a b[T/L][SA][S]Positive[/S]", "ner", "Positive", ("wrong_task",)),
    ("a[ORG]b[T/L][NER]", "ner", (), ("marker_in_transcript",)),
    ("a[NER]b[SA]", None, None, ("marker_in_transcript", "marker_in_transcript")),
    ("a b[T/L][NER][T/L][ORG]a[/ORG]", "ner", (("ORG", "a"),), ("repeated_separator",)),
    ("a b[T/L][NER][NER][ORG]a[/ORG]", "ner", (("ORG", "a"),), ("repeated_separator",)),
    ("a b[T/L][NER][SA]", "ner", (), ("repeated_separator",)),
    ("a b[T/L][NER][S]a[/S]", "ner", (), ("foreign_marker", "text_outside", "foreign_marker")),
    ("a b[T/L][NER][ORG]a", "ner", (), ("unclosed_tag",)),
    ("a b[T/L][NER][ORG]a[LAW]b[/LAW]", "ner", (("LAW", "b"),), ("unclosed_tag",)),
    ("a b[T/L][NER]a[/ORG][LAW]b[/LAW]", "ner", (("LAW", "b"),), ("text_outside", "stray_close")),
    ("a b[T/L][NER][ORG]a[/LAW][LAW]b[/LAW]", "ner", (("LAW", "b"),), ("mismatched_close",)),
    ("a b[T/L][NER][ORG]a[/ORG] and [LAW]b[/LAW]", "ner", (("ORG", "a"), ("LAW", "b")),
     ("text_outside",)),
    ("a b[T/L][NER][ORG] [/ORG][LAW]b[/LAW]", "ner", (("LAW", "b"),), ("empty_phrase",)),
    ("a b[T/L][SA][S]positive[/S]", "sa", None, ("unknown_label", "missing_label")),
    ("a b[T/L][SA][S]maybe[/S][S]Neutral[/S]", "sa", "Neutral", ("unknown_label",)),
    ("a b[T/L][SA]", "sa", None, ("missing_label",)),
    ("a b[T/L][SA][S]Neutral[/S][S]Positive[/S]", "sa", "Neutral", ("extra_label",)),
    ("a b[T/L][SA][S]Neutral[/S][S]Neutral[/S]", "sa", "Neutral", ("extra_label",)),
    ("a b[T/L][SA][S]Neutral[/S][S]Positive[/S][S]Neutral[/S]", "sa", "Neutral",
     ("extra_label", "extra_label")),
    ("a b[T/L][DA][A]no[/A][A]yes[/A][A]no[/A]", "acts", ("yes", "no"), ("repeated_label",)),
    ("a b[T/L][DA][A]no[/A][A]never[/A]", "acts", ("no",), ("unknown_label",))]


@pytest.mark.parametrize(("text", "task", "outputs", "problems"), MALFORMED)
def test_a_malformed_output_is_named_and_the_rest_kept(
        text: str, task: str | None, outputs: Any, problems: tuple[str, ...]) -> None:
    parsed = parse(text, WITH_ACTS, task)
    assert parsed.problems == problems
    assert parsed.outputs == outputs
    assert parsed.transcript == " ".join(text.split("[T/L]")[0]
                                         .replace("[ORG]", " ")
                                         .replace("[NER]", " ")
                                         .replace("[SA]", " ")
                                         .split())


def test_every_kind_that_parse_can_name_has_an_example() -> None:
    assert {kind for *_, problems in MALFORMED for kind in problems} == set(PROBLEMS) - DECODERS_OWN


def test_blanks_around_markers_do_not_matter() -> None:
    spaced = "the council met [T/L]  [NER] [ORG] council [/ORG]\n"
    assert parse(spaced, REGISTRY, "ner") == Parsed("the council met", "ner", (("ORG", "council"),))


SOUP = st.lists(
    st.one_of(
        st.sampled_from(WITH_ACTS.markers),
        st.sampled_from(["Positive", "thank you", " ", "[", "]", "[/", "[T/", "[X]", "a b", "\n"]),
        st.text(max_size=4)),
    max_size=14).map("".join)


@settings(deadline=None, max_examples=400)
@given(SOUP, st.sampled_from([None, "asr", "ner", "sa", "acts", "no such task"]))
def test_parse_never_raises_and_returns_what_the_tasks_allow(text: str, task: str | None) -> None:
    parsed = parse(text, WITH_ACTS, task)
    assert set(parsed.problems) <= set(PROBLEMS) - DECODERS_OWN
    assert find_marker(parsed.transcript, WITH_ACTS) is None
    assert parsed.transcript == parsed.transcript.strip()
    assert (parsed.task is None) <= (parsed.outputs is None)
    if parsed.task is None:
        assert parsed.problems or task in (None, "asr")
        return
    spec, outputs = WITH_ACTS[parsed.task], parsed.outputs
    assert parsed.task == task or task in (None, "asr") or "wrong_task" in parsed.problems
    if isinstance(spec, SpanTask):
        assert all(label in spec.labels and phrase == phrase.strip() != "" for label,
                   phrase in outputs)
    elif spec.multi:
        assert list(outputs) == [label for label in spec.labels if label in outputs]
    else:
        assert outputs in spec.labels or ("missing_label" in parsed.problems and outputs is None)


@settings(deadline=None, max_examples=300)
@given(SOUP)
def test_what_has_no_problem_says_nothing_but_what_was_parsed(text: str) -> None:
    """Nothing is dropped in silence: the parts put together again are the text, but for blanks."""
    parsed = parse(text, WITH_ACTS)
    if parsed.problems:
        return
    again = parsed.transcript
    if parsed.task is not None:
        spec = WITH_ACTS[parsed.task]
        outputs: Any = (parsed.outputs,) if isinstance(parsed.outputs, str) else parsed.outputs
        if isinstance(spec, SpanTask):
            groups = [f"[{label}]{phrase}[/{label}]" for label, phrase in outputs]
        else:
            groups = [f"{spec.open}{label}{spec.close}" for label in outputs]
        if parsed.task == "acts":  # given back in the order of the label set
            groups.sort(
                key=lambda group: text.index(re.sub(r"\[/?A\]", "", group), text.index("[DA]")))
        again += f"[T/L]{spec.marker}" + "".join(groups)
    assert re.sub(r"\s", "", again) == re.sub(r"\s", "", text)
