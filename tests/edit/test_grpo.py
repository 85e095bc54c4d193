"""trl's trainer with advantages by strategy: what it hands over is what a pass with all hidden states gives."""

import pytest
import torch

from subspan.base import require
from subspan.edit import ResidualCredit, credit_by

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
pytest.importorskip("trl", reason="trl is not installed")

WORDS = {word: place for place, word in enumerate(("<pad>", "<eos>", "a", "b", "c", "d", "e"))}


@pytest.fixture
def make(tmp_path):
    from trl import GRPOConfig

    from datasets import Dataset
    from subspan.edit.grpo import GroupPolicyTrainer

    torch.manual_seed(0)
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="<pad>"))
    split.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=split, **names)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1, **sizes)

    def reward(completions, **_):
        # What has no "a" in it cannot be scored.
        return [float("c" in text) if "a" in text else None for text in completions]

    def trainer(share=4, kind=GroupPolicyTrainer, **options):
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
        return kind(
            transformers.LlamaForCausalLM(config),
            reward_funcs=reward,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": ["a b", "d", "e e a", "b"] * 4}),
            processing_class=tokenizer,
            **options,
        )

    return trainer


def seen_by(trainer):
    """One step; what the trainer generated, with rollouts as the strategy saw them and what it gave for them."""
    seen, strategy, generated = {}, trainer.strategy, trainer._generate_and_score_completions

    def credited(rollouts):
        seen["rollouts"], seen["credit"], seen["states"] = rollouts, strategy(rollouts), rollouts.states()
        return seen["credit"]

    def kept(inputs):
        return seen.setdefault("output", generated(inputs))

    trainer.strategy, trainer._generate_and_score_completions = credited, kept
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert any(bool((value != start[name]).any()) for name, value in trainer.model.state_dict().items())
    trainer.model.load_state_dict(start)
    return seen


def test_advantages_by_token_are_those_of_the_states_before_the_last_block(make):
    from subspan.edit.grpo import ResRLTrainer

    credit = ResidualCredit(rank=3, positive_weight=0.25)
    trainer = make(kind=ResRLTrainer, credit=credit)
    found = seen_by(trainer)
    output, rollouts = found["output"], found["rollouts"]
    count, width = output["completion_ids"].shape
    assert (count, output["advantages"].shape) == (8, (8, width))
    with torch.no_grad():
        states = trainer.model.eval()(
            torch.cat([output["prompt_ids"], output["completion_ids"]], 1),
            attention_mask=torch.cat([output["prompt_mask"], output["completion_mask"]], 1),
            output_hidden_states=True,
        ).hidden_states[-2][:, -width - 1 : -1]
    torch.testing.assert_close(found["states"], states, atol=1e-5, rtol=1e-4)
    scored = torch.tensor([WORDS["a"] in row.tolist() for row in output["completion_ids"]])
    right = torch.tensor([WORDS["c"] in row.tolist() for row in output["completion_ids"]]) & scored
    assert torch.equal(rollouts.right, right)
    assert right.any()
    assert not scored.all()
    assert bool((scored & ~right).any())
    mask = output["completion_mask"].bool() & scored.unsqueeze(1)
    expected = credit.advantages(rollouts.advantages, states, mask, right, [0] * 4 + [1] * 4)
    expected[~scored] = 0
    torch.testing.assert_close(output["advantages"], expected, atol=1e-5, rtol=1e-4)
    wrong = output["advantages"][scored & ~right][rollouts.advantages[scored & ~right] != 0]
    assert len(wrong.unique()) > 2


def test_strategies_of_answers_hand_over_one_number_each(make):
    found = seen_by(make(strategy="nsr"))
    output, right = found["output"], found["rollouts"].right
    scored = torch.tensor([WORDS["a"] in row.tolist() for row in output["completion_ids"]])
    assert output["advantages"].tolist() == torch.where(scored & ~right, -1.0, 0.0).tolist()
    assert 0 < int((scored & ~right).sum()) < 8
    own = seen_by(make(strategy=lambda rollouts: rollouts.advantages * 2))
    assert torch.equal(own["output"]["advantages"], 2 * own["rollouts"].advantages)
    with pytest.raises(ValueError, match="strategy: 'grpo', 'nsr', 'w_reinforce', 'resrl' or a function, got 'ppo'"):
        make(strategy="ppo")
    with pytest.raises(ValueError, match="credit: only strategy='resrl'"):
        credit_by("nsr", ResidualCredit())


def test_groups_that_are_torn_apart_are_refused(make):
    with pytest.raises(ValueError, match=r"args: a process gets 2 answers a generation .* whole groups of 4"):
        make(share=1)  # as with four processes, each of which would get half of a group


def test_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    with pytest.raises(ImportError, match=r"pip install 'subspan\[rl\]'"):
        require("trl", extra="rl")
