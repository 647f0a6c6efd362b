"""Tiny tokenizers of every kind that causal LMs come with, and what has to hold of each.

For `backbones.py`. What cannot be right, such as a tokenizer without capital letters, must be
refused by the one error that training puts in place of a run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from backbone_checks import Bench, Cells, reset, said, told
from tiny_runs import tiny
from tokenizers import AddedToken, Regex, Tokenizer, models, processors, trainers
from tokenizers import decoders as d
from tokenizers import normalizers as n
from tokenizers import pre_tokenizers as p
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from unislu_llm.config import DecodeConfig
from unislu_llm.data.manifest import write_manifest
from unislu_llm.decoding.engine import Engine
from unislu_llm.errors import UserError
from unislu_llm.tasks import Span
from unislu_llm.tokenizer import make_examples
from unislu_llm.training.trainer import Trainer
from unislu_llm.unified import parse, reference_output
from unislu_llm.utterance import Utterance

COLUMNS = {
    "loads": "training puts the model together and takes two steps",
    "markers": "a target's ids are spelled back as transcript and outputs",
    "text": "text is spelled back, letter for letter",
    "names": "what a special token is called is text where a text says it",
    "words": "a phrase has the tokens that it has in its sentence",
    "prompts": "special tokens are one id, text begins once and is not ended",
    "answers": "decoded under the grammar, a hypothesis stands word for word, and answers parse",
}
SAID: tuple[tuple[str, dict[str, Any]], ...] = (
    ("The Council met Anna O'Neil in Zürich on 12 May 2004.", {
        "ner": (Span("PERSON", 16, 27), Span("PLACE", 31, 37), Span("WHEN", 41, 52))}),
    ("A naïve señor's 1,250 cafés: re-opened, aren't they?", {"sa": "Positive"}),
    ("我们感谢欧洲议会", {"ner": (Span("ORG", 4, 8),)}),
    ("it was 25% of 3.5 (yes) “good”", {"ner": ()}))
SPECIAL, NAMES = "<|user|>", ("<unk>", "<s>", "</s>", "<pad>")
GPT4 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LETTERS = sorted({*map(chr, range(33, 127)), *"".join(text for text, _ in SAID)} - {" "})
Tokens = PreTrainedTokenizerBase


def wrapped(backend: Tokenizer, *, bos: bool = False, ends: bool = False, special: bool = True,
            **names: Any) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a beginning before a text, and an end behind it, if asked to."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | names
    known = [t for t in dict.fromkeys([*names.values(), *([SPECIAL] if special else [])]) if t]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in known])
    around = (["<s>"] if bos else []) + ["$A"] + (["</s>"] if ends else [])
    if bos or ends:
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(around),
            special_tokens=[(t, backend.token_to_id(t)) for t in around if t != "$A"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def trained(model: Any, trainer: Any, pre: Any = None, decoder: Any = None, normal: Any = None,
            **options: Any) -> Tokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder, backend.normalizer = pre, decoder, normal
    texts = [text for text, _ in SAID] * 2 + list(tiny.TEXTS)
    backend.train_from_iterator(texts + [" " + text for text in texts], trainer(
        vocab_size=options.pop("size", 600), show_progress=False,
        special_tokens=list(options.pop("specials", NAMES)), **options))
    return backend


def byte_level(pre: Any = None, normal: Any = None, prefix: bool = False,
               **names: Any) -> PreTrainedTokenizerFast:
    pre = pre or p.ByteLevel(add_prefix_space=prefix)
    return wrapped(trained(models.BPE(), trainers.BpeTrainer, pre, d.ByteLevel(), normal,
                           initial_alphabet=p.ByteLevel.alphabet(), specials=()), **names)


def split(pattern: str) -> Any:
    """Byte level behind a regular expression."""
    return p.Sequence([p.Split(Regex(pattern), "isolated"), p.ByteLevel(False, use_regex=False)])


def with_bytes(backend: Tokenizer) -> Tokenizer:
    """What is in no token is spelled by its bytes, as SentencePiece does."""
    model = json.loads(backend.to_str())["model"]
    size = len(model["vocab"])
    if isinstance(model["vocab"], dict):
        vocab = model["vocab"] | {f"<0x{i:02X}>": size + i for i in range(256)}
        backend.model = models.BPE(vocab, [tuple(pair) for pair in model["merges"]],
                                   byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    else:
        pieces = [*map(tuple, model["vocab"]), *((f"<0x{i:02X}>", -20.0) for i in range(256))]
        backend.model = models.Unigram(pieces, 0, byte_fallback=True)
    return backend


def sentencepiece(scheme: str = "always", *, unigram: bool = False, fallback: bool = True,
                  normal: Any = None, cut: bool = True, **names: Any) -> PreTrainedTokenizerFast:
    space = p.Metaspace(prepend_scheme=scheme)
    if not fallback:
        decoder: Any = d.Metaspace(prepend_scheme=scheme)
    else:
        decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(),
                              *([] if scheme == "never" else [d.Strip(" ", 1, 0)])])
    if unigram:
        backend = trained(models.Unigram(), trainers.UnigramTrainer, space, decoder, normal,
                          unk_token="<unk>", initial_alphabet=[*LETTERS, "▁"])
    else:
        backend = trained(models.BPE(unk_token="<unk>"), trainers.BpeTrainer, space, decoder,
                          normal, initial_alphabet=[*LETTERS, "▁"])
    backend.pre_tokenizer = p.Metaspace(prepend_scheme=scheme, split=cut)
    return wrapped(with_bytes(backend) if fallback else backend, **names)


def normalised(prepend: bool, **names: Any) -> PreTrainedTokenizerFast:
    """Blanks are replaced by the normaliser, as in Llama 2's files and in Gemma's."""
    decoder = [d.Replace("▁", " "), d.ByteFallback(), d.Fuse()]
    backend = trained(models.BPE(unk_token="<unk>"), trainers.BpeTrainer, p.Metaspace(),
                      d.Sequence(decoder + ([d.Strip(" ", 1, 0)] if prepend else [])),
                      initial_alphabet=[*LETTERS, "▁"])
    normal = [n.Prepend("▁")] if prepend else []
    backend.normalizer = n.Sequence([*normal, n.Replace(" ", "▁")])
    backend.pre_tokenizer = None if prepend else p.Split(" ", "merged_with_previous")
    return wrapped(with_bytes(backend), bos=True, **names)


def word_piece(lower: bool) -> PreTrainedTokenizerFast:
    backend = trained(
        models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer, p.BertPreTokenizer(),
        d.WordPiece(), n.BertNormalizer(lowercase=lower),
        initial_alphabet=LETTERS, continuing_subword_prefix="##")
    return wrapped(backend, bos=True, ends=True)


def suffixed(lower: bool) -> PreTrainedTokenizerFast:
    """Words end in `</w>`."""
    model = models.BPE(unk_token="<unk>", end_of_word_suffix="</w>", fuse_unk=True)
    normal = n.Sequence([n.NFC(), n.Lowercase()] if lower else [n.NFC()])
    return wrapped(trained(model, trainers.BpeTrainer, p.BertPreTokenizer(), d.BPEDecoder("</w>"),
                           normal, initial_alphabet=LETTERS, end_of_word_suffix="</w>"))


def characters() -> PreTrainedTokenizerFast:
    vocab = {t: i for i, t in enumerate([*NAMES, " ", *LETTERS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = p.Split(Regex("."), "isolated"), d.Fuse()
    return wrapped(backend)


def words() -> PreTrainedTokenizerFast:
    return wrapped(trained(models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer,
                           p.Whitespace(), None, size=20))


def added(*tokens: Any) -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.add_tokens(list(tokens))
    return tokenizer


MASK = AddedToken("<mask>", lstrip=True, rstrip=True, special=True)
KINDS: dict[str, Callable[[], Tokens]] = {
    "byte-level BPE": byte_level,
    "byte-level BPE, a blank before each text (RoBERTa)": lambda: byte_level(prefix=True),
    "GPT-2: one token begins, ends and fills": lambda: byte_level(
        bos_token="</s>", pad_token="</s>"),
    "Qwen: NFC, no beginning, digits one by one": lambda: byte_level(
        split(GPT4.replace("{1,3}", "")), n.NFC(), bos_token=None),
    "Llama 3: tiktoken's pattern, a beginning, no padding": lambda: byte_level(
        split(GPT4), bos=True, pad_token=None),
    "tiktoken, nothing but an end": lambda: byte_level(split(GPT4), bos_token=None, pad_token=None),
    "byte-level BPE, digits split": lambda: byte_level(
        p.Sequence([p.Digits(individual_digits=True), p.ByteLevel(add_prefix_space=False)])),
    "byte-level BPE, NFKC": lambda: byte_level(normal=n.NFKC()),
    "byte-level BPE, NFD": lambda: byte_level(normal=n.NFD()),
    "byte-level BPE, lower case": lambda: byte_level(normal=n.Lowercase()),
    "byte-level BPE, accents stripped": lambda: byte_level(
        normal=n.Sequence([n.NFD(), n.StripAccents()])),
    "byte-level BPE, blanks removed": lambda: byte_level(normal=n.Replace(" ", "")),
    "no padding token": lambda: byte_level(pad_token=None),
    "end = padding": lambda: byte_level(pad_token="</s>"),
    "no end token": lambda: byte_level(eos_token=None),
    "an end behind each text": lambda: byte_level(bos=True, ends=True),
    "added words and runs of blanks (Phi)": lambda: added("  ", "    ", "Council", "2004"),
    "an added token that takes blanks around": lambda: added(MASK),
    "a marker's name in the vocabulary": lambda: added("[NER]"),
    "SentencePiece BPE, blank before each text": lambda: sentencepiece(bos=True),
    "SentencePiece BPE, blank before the first": lambda: sentencepiece("first", bos=True),
    "SentencePiece BPE, no blank before": lambda: sentencepiece("never", bos=True),
    "SentencePiece BPE, words not split (Llama)": lambda: sentencepiece("first", cut=False,
                                                                        bos=True),
    "SentencePiece BPE without bytes": lambda: sentencepiece(fallback=False),
    "Llama 2: blanks by the normaliser": lambda: normalised(True, pad_token=None),
    "Gemma: blanks by the normaliser, none before": lambda: normalised(False),
    "unigram, blank before each text": lambda: sentencepiece(unigram=True),
    "unigram, blank before the first": lambda: sentencepiece("first", unigram=True, bos=True),
    "unigram, no blank before": lambda: sentencepiece("never", unigram=True),
    "T5: unigram without bytes, NFKC, an end behind each text": lambda: sentencepiece(
        unigram=True, fallback=False, normal=n.NFKC(), ends=True, bos_token=None),
    "WordPiece": lambda: word_piece(False),
    "WordPiece, lower case": lambda: word_piece(True),
    "words that end in </w>": lambda: suffixed(False),
    "words that end in </w>, lower case (GPT)": lambda: suffixed(True),
    "characters": characters,
    "whole words": words,
    "bytes, without a backend (ByT5)": lambda: ByT5Tokenizer(
        extra_ids=0, additional_special_tokens=[SPECIAL], bos_token="<s>"),
}


# ---- one property each: what is not so is an AssertionError that says what


def corpus(bench: Bench) -> list[Utterance]:
    """Utterances with capital letters, accents, digits, signs, and without blanks."""
    return [replace(u, text=text, labels=labels, hypothesis=text)
            for u, (text, labels) in zip(bench.utterances, SAID, strict=True)]


def markers(model: Any, bench: Bench) -> None:
    for example in make_examples(corpus(bench), model.registry):
        target = model.tokenizer.target(example)
        found = parse(model.tokenizer.decode(target.ids), model.registry)
        task = example.task and model.registry[example.task]
        assert found.task == example.task, f"task {found.task}"
        assert not found.problems, f"{found.problems}"
        right = reference_output(example.utterance, task) if task else None
        # Which letters the phrases have is for the next column.
        assert kinds_of(found.outputs) == kinds_of(right), f"{found.outputs!r} for {right!r}"


def kinds_of(outputs: Any) -> Any:
    """Labels, without the phrases that have them."""
    return [label for label, _ in outputs] if isinstance(outputs, tuple) else outputs


def text(model: Any, bench: Bench) -> None:
    for u in corpus(bench):
        back = model.tokenizer.decode(model.tokenizer.text_ids(u.text))
        assert back == u.text, f"'{u.text}' comes back as '{back}'"


def names(model: Any, bench: Bench) -> None:
    ids = model.tokenizer.text_ids(f"a{SPECIAL} </s>")
    found = set(ids) & {*model.tokenizer.base.all_special_ids} - {
        model.tokenizer.base.unk_token_id}
    assert not found, f"became {model.tokenizer.base.convert_ids_to_tokens(sorted(found))}"


def words_inside(model: Any, bench: Bench) -> None:
    tokenizer = model.tokenizer
    for sentence, word in (("The Council met", "Council met"), ("met in Zürich", "in Zürich"),
                           ("on 12 May 2004", "2004")):
        inside, alone = tokenizer.text_ids(sentence), tokenizer.text_ids(word)
        assert inside[-len(alone):] == alone, f"'{word}' has other tokens in '{sentence}'"


def prompts(model: Any, bench: Bench) -> None:
    tokenizer, base = model.tokenizer, model.tokenizer.base
    prefix = tokenizer.prompt_ids(f"{SPECIAL}Hear this", first=True)
    suffix = tokenizer.prompt_ids(f"now write{SPECIAL}")
    special, bos = base.convert_tokens_to_ids(SPECIAL), base.bos_token_id
    assert (prefix + suffix).count(special) == 2, "a special token is not one id"
    wants = bos is not None and base("a")["input_ids"][0] == bos
    assert (prefix[0] == bos) == wants, "the beginning of text"
    assert tokenizer.eos_id not in (prefix + suffix)[wants:], "a prompt is ended"
    told = base.decode(suffix, skip_special_tokens=False).strip()
    assert told.replace(f" {SPECIAL}", SPECIAL) == f"now write{SPECIAL}", f"spelled as '{told}'"


def answers(model: Any, bench: Bench) -> None:
    examples = make_examples(corpus(bench), model.registry)
    batch = model.collator().from_waves(examples, bench.waves)
    how = DecodeConfig(grammar=True, force_task=True, transcript="verbatim", max_new_tokens=160)
    for u, answer in zip(corpus(bench), Engine(model, how).answer(batch, [["ner", "sa"]] * 4),
                         strict=True):
        assert answer.transcript == u.text, f"'{answer.transcript}' in place of '{u.text}'"
        # A model of two steps may repeat itself; that a loop was cut is no fault of the tokens.
        wrong = {n: rest for n, p in answer.problems.items() if (rest := {*p} - {"loop"})}
        assert not wrong, f"{wrong}"


CHECKS = {"markers": markers, "text": text, "names": names, "words": words_inside,
          "prompts": prompts, "answers": answers}


def check(kind: str, bench: Bench) -> Cells:
    """What was found of a kind, by column; `refused` is the one error that a user gets."""
    folder, run = bench.home / "tokenizer", bench.home / "tokenizer-run"
    write_manifest(bench.home / "written.jsonl", corpus(bench))
    cells = Cells()
    try:
        tokenizer: Any = KINDS[kind]()
        tiny.make_llm("llama", tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        config = bench.config(folder, run, max_steps=2)
        config.data.train = [str(bench.home / "written.jsonl")]
        config.model.lora.target_modules = ["q_proj"]
        torch.manual_seed(0)
        trainer = Trainer("speech_llm", config)
        trainer.fit()
        cells["loads"], model = "yes", trainer.model.eval()
        for name, test in CHECKS.items():
            try:
                test(model, bench)
                cells[name] = "yes"
            except Exception as error:
                cells[name] = said(error, bench)
    except UserError as error:
        return {"refused": told(error, bench)}
    except Exception as error:
        return {"loads": said(error, bench)}
    finally:
        reset(folder, run)
    return cells
