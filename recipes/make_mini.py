"""Build the mini corpus: a few minutes of annotated synthetic speech to try everything on.

    python recipes/make_mini.py --voiced voiced-voxpopuli --out recipes/data/mini

The entity part is chosen from a voiced SLUE-VoxPopuli (`train.jsonl`, `dev.jsonl` and their audio),
the sentiment part is voiced from `sentiment_lines.tsv`. Needs the `voices` extra and the program
`flite`. Same seed, same samples.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import soundfile
from make_voices import VOICES, Line, Voice, utterance_rng, voice_lines
from noise import MILD

from unislu_llm.errors import UserError, reported
from unislu_llm.io import read_json_lines
from unislu_llm.tasks import NER, SA

Row = dict[str, Any]

HERE = Path(__file__).resolve().parent
COUNTS = {"train": 110, "dev": 40}  # entity clips of each split
WITH_ENTITIES = 0.85  # share of them that have any
SECONDS = (2.0, 8.0)
MIN_SNR = 15.0  # dB
SPLITS = ("train", "dev")


def is_mild(row: Row) -> bool:
    """Whether a voiced row is 2 to 8 s long and clean or at 15 dB SNR or more."""
    snr = re.search(r"([\d.]+)dB", row["condition"])
    short = SECONDS[0] <= row["duration"] <= SECONDS[1]
    return short and (snr is None or float(snr.group(1)) >= MIN_SNR)


def choose_entities(rows: Iterable[Row], count: int, seed: int, taken_texts: set[str]) -> list[Row]:
    """Mild rows of different texts, 85 % with entities; every label occurs, rare ones more often.

    Args:
        rows: of the voiced corpus.
        count: of rows to choose.
        seed: of the order in which they are considered.
        taken_texts: texts of the other split; not chosen, and extended by those looked at.

    Raises:
        UserError: fewer rows fit.
    """
    pool: list[Row] = []
    for row in rows:
        if is_mild(row) and row["text"] not in taken_texts:
            taken_texts.add(row["text"])
            pool.append(row)
    pool.sort(key=lambda row: utterance_rng(seed, row["id"]).random())
    frequency = Counter(span["label"] for row in pool for span in row["ner"])
    annotated = [row for row in pool if row["ner"]]
    wanted = round(count * WITH_ENTITIES)
    labels = {row["id"]: {span["label"] for span in row["ner"]} for row in annotated}
    every = [next(row for row in annotated if label in labels[row["id"]]) for label in frequency]
    rare = {label for label, _ in frequency.most_common()[-(len(NER.labels) // 2) :]}
    first = [row for row in annotated if labels[row["id"]] & rare][: wanted // 2]
    chosen = list({row["id"]: row for row in [*every, *first, *annotated]}.values())[:wanted]
    chosen += [row for row in pool if not row["ner"]][: count - len(chosen)]
    if len(chosen) < count:
        raise UserError(f"--voiced: only {len(chosen)} of {count} clips fit; give a larger voiced "
                        "corpus")
    return sorted(chosen, key=lambda row: row["id"])


def entity_part(voiced: Path, out: Path, seed: int) -> dict[str, list[Row]]:
    """Choose, copy and describe the entity clips, under the time and number of the source's id."""
    texts: set[str] = set()
    part: dict[str, list[Row]] = {}
    for split in ("dev", "train"):  # dev first: it is the smaller pool
        part[split] = []
        rows = read_json_lines(voiced / f"{split}.jsonl")
        for row in choose_entities(rows, COUNTS[split], seed, texts):
            short = "vp_" + re.sub(r"[^0-9_-]", "", row["id"].split("_", 1)[-1])
            audio = f"audio/{short}.opus"
            shutil.copyfile(voiced / row["audio"], out / audio)
            part[split].append({"id": short, "audio": audio, "text": row["text"], "ner": row["ner"],
                                "duration": duration_of(out / audio), "corpus": "mini-entities",
                                "condition": row["condition"]})
    return part


def read_lines(path: Path) -> list[Row]:
    """The sentiment lines: `text`, `label` and `split` columns, with an id by split and position.

    Raises:
        UserError: a label or split that does not exist, or a text that occurs twice.
    """
    rows: list[Row] = []
    seen: set[str] = set()
    numbers: Counter[str] = Counter()
    with path.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        for number, row in enumerate(table, start=2):
            if row["label"] not in SA.labels or row["split"] not in SPLITS or row["text"] in seen:
                raise UserError(f"{path}:{number}: need a new text, a label of "
                                f"{', '.join(SA.labels)} and a split of {', '.join(SPLITS)}; "
                                f"found {row}")
            seen.add(row["text"])
            numbers[row["split"]] += 1
            rows.append({**row, "id": f"iv_{row['split']}_{numbers[row['split']]:03d}"})
    return rows


def sentiment_part(lines: Path, out: Path, seed: int, workers: int,
                   voices: tuple[Voice, ...] = VOICES) -> dict[str, list[Row]]:
    """Voice and describe the sentiment lines."""
    rows = read_lines(lines)
    clips = voice_lines([Line(row["id"], row["text"]) for row in rows], out / "audio",
                        voices=voices, mix=MILD, seed=seed, workers=workers)
    part: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for row, clip in zip(rows, clips, strict=True):
        part[row["split"]].append({
            "id": row["id"], "audio": f"audio/{clip.audio.name}", "text": row["text"],
            "sa": row["label"], "duration": round(clip.duration, 3), "corpus": "mini-sentiment",
            "speaker": clip.speaker, "condition": clip.condition})
    return part


def duration_of(path: Path) -> float:
    """Length of an audio file in seconds, to the millisecond."""
    return round(float(soundfile.info(path).duration), 3)


def write_jsonl(path: Path, rows: Sequence[Row]) -> None:
    """Write a manifest."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8")


def summary(name: str, rows: Sequence[Row]) -> str:
    """Clips, minutes and label counts of a manifest, as a Markdown table row."""
    labels = Counter(label for row in rows
                     for label in [s["label"] for s in row.get("ner", [])] or [row.get("sa")])
    counts = ", ".join(f"{label} {n}" for label, n in sorted(labels.items(), key=str) if label)
    minutes = sum(row["duration"] for row in rows) / 60
    return f"| `{name}` | {len(rows)} | {minutes:.1f} | {counts} |"


def build(voiced: Path, lines: Path, out: Path, seed: int = 0, workers: int = 1) -> None:
    """Write audio and the four manifests into `out`."""
    (out / "audio").mkdir(parents=True, exist_ok=True)
    parts = {"entities": entity_part(voiced, out, seed),
             "sentiment": sentiment_part(lines, out, seed, workers)}
    for kind, part in parts.items():
        for split in SPLITS:
            write_jsonl(out / f"{kind}_{split}.jsonl", part[split])
            print(summary(f"{kind}_{split}.jsonl", part[split]))


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voiced", type=Path, required=True,
                        help="folder of the voiced SLUE-VoxPopuli, with train.jsonl and dev.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--lines", type=Path, default=HERE / "data/mini/sentiment_lines.tsv",
                        help="sentiment lines (text, label, split)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that voice")
    args = parser.parse_args()
    with reported():
        build(args.voiced, args.lines, args.out, args.seed, args.workers)


if __name__ == "__main__":
    main()
