"""Make a corpus of 25 clips with labels of its own, to see what 20 of them teach.

    pip install -c constraints.txt -e '.[voices]'
    python recipes/make_drugs.py --out runs/drugs     # train.jsonl (20 clips), dev.jsonl (5)

What is said to nurses and pharmacists, by Piper's voice in five variants (synthetic speech); DRUG
and DOSE are given as phrases. The tasks are those of recipes/configs/tasks_drugs.yaml.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from make_voices import VOICES, Line, PiperVoice, voice_lines
from noise import MILD

from unislu_llm.errors import reported
from unislu_llm.io import write_text

LINES = {
    "train": """
please give her (DRUG aspirin) with (DOSE two glasses) of water after lunch
i take (DOSE 20 milligrams) of (DRUG morphine) every evening
the doctor gave me (DRUG penicillin) for my throat
he needs (DOSE three tablets) of (DRUG ibuprofen) for his knee
you should not drink alcohol while you take (DRUG codeine)
my mother injects (DOSE 10 units) of (DRUG insulin) before breakfast
we ran out of (DRUG paracetamol) last night
the nurse brought (DOSE one capsule) of (DRUG vitamin d) this morning
they stopped the (DRUG cortisone) because it made him sick
take (DOSE 500 milligrams) of (DRUG amoxicillin) twice a day
(DRUG caffeine) keeps me awake so i only have (DOSE half a cup)
the patient in room four asked for (DRUG morphine) again
put (DOSE two drops) of (DRUG glycerin) into each ear
she has been on (DRUG insulin) since she was a child
is (DOSE four tablets) of (DRUG aspirin) too much for my father
there was no (DRUG ibuprofen) left in the pharmacy
start with (DOSE one spoon) of (DRUG magnesium) and drink a lot
he forgot where he had put his glasses and went home
(DRUG melatonin) helps but never take more than (DOSE five milligrams)
the appointment is on monday so please come a little earlier
""",
    "dev": """
give him (DOSE two tablets) of (DRUG paracetamol) before he goes to sleep
the doctor said that (DRUG penicillin) would not help this time
i bought (DRUG magnesium) and took (DOSE three capsules) at once
she gets (DOSE 30 milligrams) of (DRUG cortisone) in the morning
is (DRUG codeine) safe for my daughter or should we wait
""",
}
"""What is said, with its labelled phrases in brackets."""


def parse(line: str) -> tuple[str, dict[str, list[str]]]:
    """The text of a line, and its phrases by label."""
    phrases: dict[str, list[str]] = {}
    for label, phrase in re.findall(r"\(([A-Z]+) ([^)]*)\)", line):
        phrases.setdefault(label, []).append(phrase)
    return re.sub(r"\([A-Z]+ ([^)]*)\)", r"\1", line), phrases


def build(out: Path, seed: int = 0) -> None:
    """Write `train.jsonl`, `dev.jsonl` and their audio into `out`."""
    voices = tuple(voice for voice in VOICES if isinstance(voice, PiperVoice))
    for split, text in LINES.items():
        rows: list[dict[str, Any]] = []
        for i, line in enumerate(text.split("\n")[1:-1], 1):
            said, phrases = parse(line)
            rows.append({"id": f"{split}_{i:02d}", "text": said, "drugs": phrases,
                         "corpus": "drugs"})
        clips = voice_lines([Line(row["id"], row["text"]) for row in rows], out / "audio",
                            voices=voices, mix=MILD, seed=seed)
        for row, clip in zip(rows, clips, strict=True):
            row |= {"audio": f"audio/{clip.audio.name}", "duration": round(clip.duration, 3)}
        write_text(out / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{out / split}.jsonl: {len(rows)} clips, "
              f"{sum(row['duration'] for row in rows):.0f} s")


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of voices and conditions")
    args = parser.parse_args()
    with reported():
        build(args.out, args.seed)


if __name__ == "__main__":
    main()
