"""Markdown of an error report: systems side by side in every table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from unislu_llm.analysis.errors import PREDICTED_KINDS, REFERENCE_KINDS

Block = Mapping[str, Any]


def markdown(result: Block) -> str:
    """The report of :func:`unislu_llm.analysis.error_report.measure`'s plain data."""
    systems: dict[str, Any] = {name: system["corpora"] for name, system in result["systems"].items()}
    corpora = list(next(iter(systems.values())))
    left = f", {result['rows_left_out']} that not all systems have left out" if result["rows_left_out"] else ""
    parts = [f"# Errors of {', '.join(systems)}", f"Protocol `{result['protocol']}`; {result['rows']} rows{left}. What each "
             "column means: eval/README.md, \"Errors by cause\"."]
    parts += ["## Words", _table("corpus", corpora, systems, lambda block: _words(block["words"]))]
    parts += _splits(corpora, systems)
    for task in dict.fromkeys(task for blocks in systems.values() for block in blocks.values() for task in block["tasks"]):
        here = [c for c in corpora if any(task in blocks[c]["tasks"] for blocks in systems.values())]
        own = {name: {c: blocks[c]["tasks"][task] for c in here} for name, blocks in systems.items()}
        blocks = own[next(iter(own))]
        # All corpora together say no more than the only one that has the task.
        kept = here[:1] if blocks[here[0]]["n"] == blocks[here[-1]]["n"] else here
        spans = "reference" in blocks[here[0]]
        parts += _entities(task, kept, own) if spans else _labels(task, kept, own)
    for name, pair in result["comparisons"].items():
        parts += _comparison(name, result["compared_to"], pair, result)
    return "\n\n".join(parts)


def _table(first: str, groups: Sequence[str], systems: Mapping[str, Block], cells: Callable[[Any], dict[str, Any]]) -> str:
    """A row a group and system."""
    return _tabulate([{first: group, "system": name, **cells(blocks[group])} for group in groups
                      for name, blocks in systems.items() if group in blocks])


def _tabulate(rows: Sequence[Mapping[str, Any]]) -> str:
    headers = list(dict.fromkeys(key for row in rows for key in row))
    body = [[row.get(key, "-") for key in headers] for row in rows]
    return tabulate(body, headers=headers, tablefmt="github", disable_numparse=True)


def _words(w: Block) -> dict[str, Any]:
    words = max(w["ref_words"], 1)
    kinds = {title: f"{100 * w[key] / words:.1f}" for title, key in (("sub", "substitutions"), ("del", "deletions"),
                                                                    ("ins", "insertions"))}
    rest = w["without_hallucinated"]
    return {"n": w["n"], "words": w["ref_words"], "WER": f"{w['wer']:.1f}", **kinds, "too long": _share(w["long"], w["n"]),
            "loop": _share(w["loop"], w["n"]), "WER without both": f"{rest['wer']:.1f}" if rest["n"] else "-",
            "same answer": _share(w["same_answer"], w["n"])}


def _splits(corpora: Sequence[str], systems: Mapping[str, Block]) -> list[str]:
    """WER by length and by other fields: a row a group, a column a system."""
    parts = []
    blocks = next(iter(systems.values()))
    fields = dict.fromkeys(name for c in corpora for name in blocks[c]["words"]["by"])
    for title, get in [("length of the reference", lambda w: w["by_length"]),
                       *((f"`{name}`", lambda w, name=name: w["by"].get(name, {})) for name in fields)]:
        rows = [{"corpus": c, "group": group, "n": part["n"],
                 **{name: f"{get(own[c]['words'])[group]['wer']:.1f}" for name, own in systems.items()}}
                for c in corpora for group, part in get(blocks[c]["words"]).items()]
        parts += [f"### WER by {title}", _tabulate(rows)]
    return parts


def _entities(task: str, corpora: Sequence[str], systems: Mapping[str, Block]) -> list[str]:
    def scores(b: Block) -> dict[str, Any]:
        words = b["words"]
        return {"n": b["n"], "precision": f"{b['precision']:.1f}", "recall": f"{b['recall']:.1f}", "F1": f"{b['f1']:.1f}",
                "recall on heard": f"{b['heard']['recall']:.1f}", "F1 on heard": f"{b['heard']['f1']:.1f}",
                "WER in entities": f"{words['inside']['wer']:.1f}", "WER outside": f"{words['outside']['wer']:.1f}",
                "unanswered rows": b["unanswered"]["rows"], "entities in them": b["unanswered"]["reference"]}

    def kinds(side: str, total: str, names: Mapping[str, str]) -> Callable[[Block], dict[str, Any]]:
        return lambda b: {"entities": b[total], **{_title(k): _share(b[side][k], b[total]) for k in names}}

    sides = (("Reference entities", kinds("reference", "n_gold", REFERENCE_KINDS)),
             ("Predicted entities", kinds("predicted", "n_pred", PREDICTED_KINDS)))
    parts = [f"## Entities: `{task}`", _table("corpus", corpora, systems, scores)]
    for title, cells in sides:
        parts += [f"### {title}", _table("corpus", corpora, systems, cells)]
    last = {name: blocks[corpora[-1]]["by_label"] for name, blocks in systems.items()}
    labels = sorted({label for blocks in last.values() for label in blocks})
    for title, cells in sides if labels else ():
        parts += [f"### {title} by label", _table("label", labels, last, cells)]
    return parts


def _labels(task: str, corpora: Sequence[str], systems: Mapping[str, Block]) -> list[str]:
    def scores(b: Block) -> dict[str, Any]:
        by_wer = {f"at WER {name}": "-" if part["accuracy"] is None else f"{part['accuracy']:.1f} (n {part['n']})"
                  for name, part in b["by_wer"].items()}
        return {"n": b["n"], "macro F1": f"{b['macro_f1']:.1f}", "accuracy": f"{b['accuracy']:.1f}", **by_wer,
                "no answer": b["missing"], "unknown word": b["unknown"]}

    parts = [f"## Labels: `{task}`", _table("corpus", corpora, systems, scores), "### Confusion (row: reference)"]
    rows = [{"system": name, "reference": label, **dict(zip(block["confusion_labels"], counts, strict=True))}
            for name, blocks in systems.items() for block in [blocks[corpora[-1]]]
            for label, counts in zip(block["confusion_labels"], block["confusion"], strict=False)]
    return [*parts, _tabulate(rows)]


def _comparison(name: str, first: str, pair: Block, result: Block) -> list[str]:
    scores = [{"score": score, first: f"{v['first']:.1f}", name: f"{v['other']:.1f}", "difference": f"{v['difference']:+.1f}",
               "95 % interval": f"{v['low']:+.1f} to {v['high']:+.1f}", "p": f"{v['p_value']:.3f}"}
              for score, v in pair["scores"].items()]
    counts = [{"corpus": corpus, **part} for corpus, part in pair["utterances"].items()]
    parts = [f"## {name} compared to {first}",
             f"Paired bootstrap over utterances, corpora drawn each by itself, {result['resamples']} resamples, "
             f"seed {result['seed']}.", _tabulate(scores), f"Utterances where {name} makes fewer, as many or more word errors:",
             _tabulate(counts)]
    shown = [f"- `{e['id']}` ({e['corpus']}, {e['ref_words']} words)\n"
             f"  - reference: {e['ref']}\n"
             f"  - {first}, {e['errors'][0]} errors: {e['first'] or '(empty)'}\n"
             f"  - {name}, {e['errors'][1]} errors: {e['other'] or '(empty)'}" for e in pair["examples"]]
    return [*parts, "### Largest differences", "\n".join(shown)] if shown else parts


def _share(count: int, total: int) -> str:
    return f"{count} ({100 * count / total:.0f} %)" if total else str(count)


def _title(kind: str) -> str:
    return kind.replace("_", " ")
