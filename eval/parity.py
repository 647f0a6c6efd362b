"""Whether plain transformers answers a merged folder's parity prompts as the trained model does.

    python eval/parity.py FOLDER

needs nothing of unislu_llm: copied beside the folder, it runs where only transformers is. Exit
status 1: a prompt has other ids, or an answer differs at more than a close call.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

CLOSE = 1e-3  # nats by which the order of sums alone may tip a choice


def main(folder: Path) -> int:
    """Answer every prompt, print what differs, and count it."""
    rows = [json.loads(x) for x in (folder / "parity.jsonl").read_text("utf-8").splitlines()]
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    respelled = tipped = wrong = 0
    for row in rows:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        respelled += ids != row["prompt_ids"]
        output = model.generate(torch.tensor([row["prompt_ids"]]),
                                max_new_tokens=len(row["answer_ids"]))
        answer = output[0, len(row["prompt_ids"]):].tolist()
        if answer != row["answer_ids"]:
            tipped += row["margin"] <= CLOSE
            wrong += row["margin"] > CLOSE
            print(f"{row['id']} {row['task']}: {tokenizer.decode(answer)!r}, expected "
                  f"{row['answer']!r} (margin {row['margin']})")
    print(f"{len(rows)} prompts: {respelled} texts give other ids, {wrong} answers differ, and "
          f"{tipped} more at a close call")
    return int(bool(respelled or wrong))


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
