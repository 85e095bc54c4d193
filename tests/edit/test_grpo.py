"""trl's trainer with weights of tokens: what it hands over is what a pass with all hidden states gives."""

import pytest
import torch

from subspan.base import require
from subspan.edit import ResidualCredit

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
pytest.importorskip("trl", reason="trl is not installed")

WORDS = {word: place for place, word in enumerate(("<pad>", "<eos>", "a", "b", "c", "d", "e"))}


@pytest.fixture
def make(tmp_path):
    from trl import GRPOConfig

    from datasets import Dataset
    from subspan.edit.grpo import ResRLTrainer

    torch.manual_seed(0)
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="<pad>"))
    split.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=split, **names)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1, **sizes)

    def trainer(credit=None, share=4):
        args = GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=4,
            gradient_accumulation_steps=2,
            max_completion_length=6,
            max_steps=1,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        args.per_device_train_batch_size = share
        return ResRLTrainer(
            transformers.LlamaForCausalLM(config),
            reward_funcs=lambda completions, **_: [float("c" in text) for text in completions],
            args=args,
            train_dataset=Dataset.from_dict({"prompt": ["a b", "d", "e e a", "b"] * 4}),
            processing_class=tokenizer,
            credit=credit,
        )

    return trainer


def test_advantages_by_token_are_those_of_the_states_before_the_last_block(make):
    credit, seen = ResidualCredit(rank=3, positive_weight=0.25), []
    trainer = make(credit)
    keep = trainer._by_token
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}

    def kept(output):
        seen.append({**output, "by token": keep(dict(output)), "right": trainer._right})
        return seen[-1]["by token"]

    trainer._by_token = kept
    trainer.train()
    assert any(bool((value != start[name]).any()) for name, value in trainer.model.state_dict().items())
    (output,) = seen
    count, width = output["completion_ids"].shape
    assert (count, output["by token"].shape) == (8, (8, width))
    trainer.model.load_state_dict(start)
    with torch.no_grad():
        states = trainer.model.eval()(
            torch.cat([output["prompt_ids"], output["completion_ids"]], 1),
            attention_mask=torch.cat([output["prompt_mask"], output["completion_mask"]], 1),
            output_hidden_states=True,
        ).hidden_states[-2][:, -width - 1 : -1]
    right = torch.tensor([WORDS["c"] in row.tolist() for row in output["completion_ids"]])
    assert torch.equal(output["right"], right)
    assert bool(right.any())
    assert not bool(right.all())
    mask = output["completion_mask"].bool()
    expected = credit.advantages(output["advantages"], states, mask, right, [0] * 4 + [1] * 4)
    torch.testing.assert_close(output["by token"], expected, atol=1e-5, rtol=1e-4)
    wrong = output["by token"][~right][output["advantages"][~right] != 0]
    assert len(wrong.unique()) > 2


def test_groups_that_are_torn_apart_are_refused(make):
    with pytest.raises(ValueError, match=r"args: a process gets 2 answers a generation .* whole groups of 4"):
        make(share=1)  # as with four processes, each of which would get half of a group


def test_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    with pytest.raises(ImportError, match=r"pip install 'subspan\[rl\]'"):
        require("trl", extra="rl")
