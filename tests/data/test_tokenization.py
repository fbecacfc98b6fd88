"""Token ids and labels of edits, with tokenizers of every common kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conformance.hosts import labels_of
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from kedit_train.data import Edit, EditDataset
from kedit_train.data.tokenization import Encoded, context_length, encode_edit, encode_prompt, pad_token_id, separator
from kedit_train.errors import EditError

CORPUS = [
    "The capital of France is Paris.",
    "Ada lives in Bern, and works for the university of Bern.",
    "Who wrote it? Ben wrote it in 1984: the answer is Ben.",
    "首都は東京です。 日本の首都は東京です。",
    "unbelievable disbelief believable",
] * 20
PAIRS = [
    ("The capital of France is", "Paris"),
    ("The capital of France is ", "Paris"),
    ("The capital of France is", " Paris"),
    ("Who wrote it?\n", "Ben"),
    ("Who wrote it? A:", "J. K. Rowling, 3.5"),
    ("首都は", "東京"),
    ("首都は", "東京です"),
    ("日本の首都 is ", "東京"),
    ("unbeliev", "\table"),
    ("Ada  lives   in", "the  university"),
]


def wrapped(core: Any, specials: dict[str, str], template: str | None = None) -> PreTrainedTokenizerFast:
    if template:
        ids = [(token, core.token_to_id(token)) for token in specials.values()]
        core.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=core, **specials)


def byte_level(specials: dict[str, str], template: str | None = None) -> PreTrainedTokenizerFast:
    core: Any = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(dict.fromkeys(specials.values())),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    return wrapped(core, specials, template)


def metaspace(specials: dict[str, str], template: str | None, prepend: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer like that of Llama 2: "▁" for a space and before a text, bytes for unknown characters."""
    core: Any = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if prepend else []
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *([decoders.Strip(" ", 1, 0)] * prepend)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", *specials.values(), *(f"<0x{i:02X}>" for i in range(256))],
        max_token_length=8,
        show_progress=False,
    )
    core.train_from_iterator([word for line in CORPUS for word in line.replace(" ", " ▁").split(" ")], trainer)
    return wrapped(core, specials | {"unk_token": "<unk>"}, template)


BOS_EOS = {"bos_token": "<s>", "eos_token": "</s>"}
BUILT = {
    "byte-level, no BOS": lambda: byte_level({"eos_token": "<|end|>"}),
    "byte-level, BOS, pad": lambda: byte_level({**BOS_EOS, "pad_token": "<pad>"}, "<s> $A"),
    "byte-level, BOS = EOS = pad": lambda: byte_level({"eos_token": "<|end|>", "pad_token": "<|end|>"}, "<|end|> $A"),
    "byte-level, adds EOS itself": lambda: byte_level(BOS_EOS, "<s> $A </s>"),
    "metaspace, BOS": lambda: metaspace(BOS_EOS, "<s> $A", True),
    "metaspace, no BOS": lambda: metaspace(BOS_EOS, None, True),
    "metaspace, adds EOS itself": lambda: metaspace(BOS_EOS, "<s> $A </s>", True),
    "metaspace without prefix": lambda: metaspace(BOS_EOS, "<s> $A", False),
}
ALL = [*BUILT, "factlm", "stories260K"]
_made: dict[str, Any] = {}


@pytest.fixture
def tokenizer(request: pytest.FixtureRequest) -> Any:
    name = request.param
    if name not in _made:
        built = name in BUILT
        _made[name] = (
            BUILT[name]()
            if built
            else AutoTokenizer.from_pretrained(request.getfixturevalue("factlm" if name == "factlm" else "stories"))
        )
    return _made[name]


every = pytest.mark.parametrize("tokenizer", ALL, indirect=True)


@pytest.mark.parametrize(
    ("prompt", "target", "expected"),
    [
        ("Ada lives in", "Bern", " "),
        ("Ada lives in ", "Bern", ""),
        ("Ada lives in", " Bern", ""),
        ("Q: where?\nA:\n", "Bern", ""),
        ("Q: where?\u00a0", "Bern", ""),
        ("The capital is", "東京", ""),
        ("首都は", "Tokyo", ""),
        ("答：", "Bern", ""),
        ("เมืองหลวงคือ", "กรุงเทพ", ""),
        ("수도는", "서울", " "),
        ("столица", "Москва", " "),
        ("العاصمة", "باريس", " "),
        ("born in", "1984", " "),
    ],
)
def test_separator_depends_on_white_space_and_script(prompt: str, target: str, expected: str) -> None:
    assert separator(prompt, target) == expected


@every
@pytest.mark.parametrize(("prompt", "target"), PAIRS)
def test_the_training_context_is_the_generation_context(tokenizer: Any, prompt: str, target: str) -> None:
    one = encode_edit(tokenizer, prompt, target)
    head, tail = one.input_ids[: one.target_start], one.input_ids[one.target_start :]
    assert head == encode_prompt(tokenizer, prompt)
    eos = tokenizer.eos_token_id
    assert tail[-1] == eos
    assert eos not in tail[:-1]
    assert encode_edit(tokenizer, prompt, target, append_eos=False).input_ids == one.input_ids[:-1]
    text = tokenizer.decode(
        [t for t in one.input_ids if t not in tokenizer.all_special_ids or t == tokenizer.unk_token_id]
    )
    assert text == prompt + separator(prompt, target) + target
    bos = tokenizer("x").input_ids[
        : len(tokenizer("x").input_ids) - len(tokenizer("x", add_special_tokens=False).input_ids)
    ]
    assert head[:1] == bos[:1] or not bos
    joint = tokenizer(prompt + separator(prompt, target) + target, add_special_tokens=False).input_ids
    alone = tokenizer(prompt, add_special_tokens=False).input_ids
    if joint[: len(alone)] == alone:  # No token crosses the border, so the joint tokens are used.
        assert one.input_ids[-1 - len(joint) : -1] == joint


def test_tokens_cross_the_border_of_some_pairs() -> None:
    """Otherwise the previous test would not cover the fallback."""
    crossing = set()
    for name, build in BUILT.items():
        tokenizer = _made.setdefault(name, build())
        for prompt, target in PAIRS:
            joint = tokenizer(prompt + separator(prompt, target) + target, add_special_tokens=False).input_ids
            alone = tokenizer(prompt, add_special_tokens=False).input_ids
            if joint[: len(alone)] != alone:
                crossing.add(name)
    assert crossing == set(BUILT)


@every
def test_every_real_edit_decodes_to_its_text(tokenizer: Any, factlm: Path) -> None:
    edits = EditDataset.load(factlm / "records.json").sample(100, seed=1)
    for edit, one in zip(edits, edits.encode(tokenizer), strict=True):
        assert one.input_ids[: one.target_start] == encode_prompt(tokenizer, edit.prompt)
        assert one.input_ids.count(tokenizer.eos_token_id) == 1 + (
            tokenizer("a").input_ids[0] == tokenizer.eos_token_id
        )
        words = tokenizer.decode(one.input_ids[one.target_start : -1])
        assert words.strip() == edit.target


def test_an_appended_eos_is_removed_from_the_prompt_and_a_written_one_stays() -> None:
    tokenizer = _made.setdefault("byte-level, adds EOS itself", BUILT["byte-level, adds EOS itself"]())
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenizer("Ada").input_ids[-1] == eos
    plain = tokenizer("Ada", add_special_tokens=False).input_ids
    assert encode_prompt(tokenizer, "Ada") == [bos, *plain]
    assert encode_prompt(tokenizer, "Ada</s>") == [bos, *plain, eos]
    assert encode_prompt(tokenizer, "Ada</s></s>") == [bos, *plain, eos, eos]
    assert encode_edit(tokenizer, "Ada is", "Ada</s>").input_ids.count(eos) == 1


@every
def test_truncation_settings_of_the_tokenizer_are_ignored(tokenizer: Any) -> None:
    before = encode_edit(tokenizer, "The capital of France is", "Paris")
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert encode_edit(tokenizer, "The capital of France is", "Paris") == before


def test_errors_name_the_edit() -> None:
    tokenizer = _made.setdefault("byte-level, no BOS", BUILT["byte-level, no BOS"]())
    edits = EditDataset([Edit("p", "t"), Edit("The capital of France is", "Paris", id="17")], name="facts.json")
    long = len(encode_edit(tokenizer, "The capital of France is", "Paris").input_ids)
    assert len(edits.encode(tokenizer, max_length=long)) == 2
    with pytest.raises(EditError) as caught:
        edits.encode(tokenizer, max_length=long - 1)
    assert str(caught.value) == (
        f"facts.json, edit 2 (id '17'): the prompt 'The capital of France is' and its target must have at "
        f"most {long - 1} tokens together, got {long}; shorten the edit, leave it out, or "
        "split long documents with kedit_train.data.split_documents"
    )
    mute = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(EditError) as caught:
        edits.encode(mute, append_eos=True)
    assert str(caught.value) == (
        "facts.json, edit 1: append_eos=True needs an end-of-text token, but the tokenizer has none; set "
        "tokenizer.eos_token, or pass append_eos=False"
    )
    assert edits.encode(mute, append_eos=False) == edits.encode(mute)
    with pytest.raises(EditError, match=r"^here: the prompt '' has no tokens; give a prompt"):
        encode_edit(tokenizer, "", "Paris", where="here")
    with pytest.raises(EditError, match=r"^the tokenizer has neither a padding nor an end-of-text token"):
        pad_token_id(mute)
    assert pad_token_id(tokenizer) == tokenizer.eos_token_id


def test_a_target_with_unknown_characters_is_an_error() -> None:
    core: Any = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "Ada": 2, "is": 3, "here": 4}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    assert encode_edit(tokenizer, "Ada is", "here") == Encoded([2, 3, 4, 1], 2)
    assert encode_edit(tokenizer, "Zoë is", "here") == Encoded([0, 3, 4, 1], 2)
    with pytest.raises(
        EditError, match=r"^f, edit 2: the target 'Bern' of the prompt 'Ada is' has characters that the"
    ):
        encode_edit(tokenizer, "Ada is", "Bern", where="f, edit 2")
    with pytest.raises(EditError, match=r"the target '.+u200a' of the prompt 'Ada is' has no tokens"):
        encode_edit(tokenizer, "Ada is", "\u200a")


def test_context_length_is_that_of_the_configuration(factlm: Path, stories: Path) -> None:
    for path in (factlm, stories):
        config = AutoModelForCausalLM.from_pretrained(path).config
        assert context_length(config) == config.max_position_embeddings
    assert context_length(object()) is None


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # trl 1.16 sets it itself
def test_trl_trains_the_same_tokens_and_labels(factlm: Path, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

    tokenizer = AutoTokenizer.from_pretrained(factlm)
    edits = EditDataset.load(factlm / "records.json").sample(4, seed=3)
    args = SFTConfig(output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(factlm),
        args=args,
        train_dataset=edits.to_prompt_completion(),
        processing_class=tokenizer,
    )
    rows: Any = trainer.train_dataset
    for row, one in zip(rows, edits.encode(tokenizer), strict=True):
        assert row["input_ids"] == one.input_ids
        assert labels_of(row) == [-100] * one.target_start + one.input_ids[one.target_start :]
