"""ScalSelect: the published formulas in small, resuming, roles, images, and samples that cannot be scored."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.exceptions import NotFittedError

from subspan.models import TokenRoles
from subspan.models.image_tokens import image_conversation, image_token_ids
from subspan.select import LeverageSelector, ScalSelect
from subspan.select.shards import RepresentationShards, Shard

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

WORDS = [
    "<unk>",
    "<pad>",
    "<image>",
    "<start>",
    "<end>",
    "USER:",
    "ASSISTANT:",
    "SYSTEM:",
    *(f"w{i}" for i in range(90)),
]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper + ': ' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<start> <image> <end> ' }}"
    "{% else %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}{% endif %}{{ ' ' }}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<start>", "<end>"],
        chat_template=TEMPLATE,
    )


def text_config():
    return transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM._from_config(text_config(), attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def vision_model():
    torch.manual_seed(1)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text_config(), image_token_index=2, vision_feature_layer=-1
    )
    config.vision_start_token_id, config.vision_end_token_id = 3, 4
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module")
def processor(tokenizer):
    pytest.importorskip("PIL", reason="Pillow is not installed")
    if not hasattr(transformers, "CLIPImageProcessorPil"):
        pytest.skip("this version of transformers processes images with torchvision only")
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE,
    )


def words(random, n):
    return " ".join(f"w{i}" for i in random.integers(0, 90, n))


@pytest.fixture(scope="module")
def pool():
    random = np.random.default_rng(0)
    return [
        {
            "id": f"{'ab'[i % 2]}_{i // 2}",
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "context", "text": words(random, 5 + i % 7)},
                        {"type": "text", "text": words(random, 3)},
                    ],
                },
                {"role": "assistant", "content": words(random, 2)},
                {"role": "user", "content": words(random, 4)},
                {"role": "assistant", "content": words(random, 3)},
            ],
        }
        for i in range(16)
    ]


@pytest.fixture(scope="module")
def fitted(model, tokenizer, pool):
    return ScalSelect(model, tokenizer).fit(pool)


def published(full, query, context, mass=0.9):
    """Stage 1 on a full forward pass of one sample, as the paper's steps say."""
    attention = full.attentions[0][0].float().mean(0)
    share = attention[query][:, context].mean(0)
    share = share / share.sum() if share.sum() > 0 else torch.full_like(share, 1 / len(share))
    ordered, order = share.sort(descending=True)
    above = (ordered.cumsum(0) > mass).nonzero()
    count = int(above[0, 0]) + 1 if len(above) else len(share)
    states = full.hidden_states[1][0].float()
    return states[context.nonzero()[:, 0][order[:count]]].mean(0)


def test_representations_follow_the_published_steps(model, tokenizer, pool, fitted):
    rows = torch.cat(list(fitted.representations()))
    for sample, row in zip(pool, rows):
        roles = TokenRoles.from_messages(tokenizer, [sample["messages"]])
        with torch.no_grad():
            full = model(**roles.batch, output_attentions=True, output_hidden_states=True)
        expected = published(full, roles.query[0], roles.context[0])
        assert torch.allclose(row, expected, atol=1e-7)
    selector = LeverageSelector(5).fit(rows)
    assert np.abs(fitted.scores_ - selector.scores_.numpy()).max() < 1e-12
    assert (fitted.select(5) == selector.indices_).all()
    assert fitted.scores_.sum() == pytest.approx(fitted.k_)


def test_batches_of_padded_samples_give_the_same_scores(model, tokenizer, pool, fitted):
    together = ScalSelect(model, tokenizer, batch_size=7, shard_size=11).fit(pool).scores_
    assert np.abs(fitted.scores_ - together).max() < 1e-4


def test_ids_are_kept_apart_and_the_frame_is_in_pool_order(model, tokenizer, pool, fitted):
    frame = fitted.scores_frame()
    assert frame["id"].tolist() == [sample["id"] for sample in pool]
    assert frame["rank"][fitted.ranking_[0]] == 1
    assert sorted(frame["rank"]) == list(range(1, 17))
    chosen = fitted.select(0.25)
    assert len(chosen) == 4
    assert set(frame["rank"][chosen]) == set(range(1, 5))
    assert len(fitted.select(6, strategy="sample", random_state=0)) == 6
    repeated = [*pool, pool[3]]
    with pytest.raises(ValueError, match="samples 3 and 16 have the same id 'b_1'"):
        ScalSelect(model, tokenizer).fit(repeated)


def test_plain_message_lists_and_generators(model, tokenizer, pool, fitted):
    plain = ScalSelect(model, tokenizer).fit(sample["messages"] for sample in pool)
    assert (plain.scores_ == fitted.scores_).all()
    assert plain.ids_.tolist() == [str(i) for i in range(16)]


def test_the_query_may_be_the_whole_text_outside_the_answers(model, tokenizer, pool, fitted):
    everything = ScalSelect(model, tokenizer, query="non_assistant").fit(pool).scores_
    assert np.abs(fitted.scores_ - everything).max() > 1e-6


@pytest.mark.parametrize("lengths", [range(2, 42), [12] * 40])
def test_scores_that_follow_the_lengths_are_said(model, tokenizer, lengths, recwarn):
    random = np.random.default_rng(0)
    texts = [[{"type": "context", "text": words(random, n)}, {"type": "text", "text": "w1 w2"}] for n in lengths]
    fitted = ScalSelect(model, tokenizer).fit([{"messages": [{"role": "user", "content": text}]} for text in texts])
    said = [str(each.message) for each in recwarn if "rank correlation" in str(each.message)]
    if len(set(lengths)) == 1:
        assert not said
    else:
        assert float(spearmanr(fitted.scores_, lengths).statistic) < -0.5
        assert "rank correlation -0." in said[0]
        assert "prefers short ones" in said[0]


# ---------------------------------------------------------------------- stopping and going on


class Stops(Exception):
    pass


def until(samples, count):
    for i, sample in enumerate(samples):
        if i == count:
            raise Stops
        yield sample


def test_a_stopped_extraction_goes_on_where_it_stopped(model, tokenizer, pool, fitted, tmp_path):
    options = {"folder": tmp_path / "shards", "shard_size": 5}
    with pytest.raises(Stops):
        ScalSelect(model, tokenizer, **options).fit(until(pool, 12))
    done = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert done == ["shard-00000.safetensors", "shard-00001.safetensors"]
    stamps = {name: (tmp_path / "shards" / name).stat().st_mtime_ns for name in done}
    resumed = ScalSelect(model, tokenizer, **options).fit(pool)
    assert np.abs(resumed.scores_ - fitted.scores_).max() < 1e-12
    assert stamps == {name: (tmp_path / "shards" / name).stat().st_mtime_ns for name in done}
    # A damaged shard is made again; nothing half-written is left beside the shards.
    (tmp_path / "shards" / done[1]).write_bytes(b"damaged")
    again = ScalSelect(model, tokenizer, **options).fit(pool)
    assert (again.scores_ == resumed.scores_).all()
    assert not [path for path in (tmp_path / "shards").iterdir() if path.name.startswith(".")]


def test_a_folder_of_other_settings_or_samples_is_refused(model, tokenizer, pool, tmp_path):
    ScalSelect(model, tokenizer, folder=tmp_path, shard_size=10).fit(pool)
    with pytest.raises(ValueError, match="another mass"):
        ScalSelect(model, tokenizer, folder=tmp_path, shard_size=10, mass=0.5).fit(pool)
    torch.manual_seed(5)
    other = transformers.LlamaForCausalLM._from_config(text_config(), attn_implementation="eager")
    with pytest.raises(ValueError, match="another weights"):
        ScalSelect(other, tokenizer, folder=tmp_path, shard_size=10).fit(pool)
    with pytest.raises(ValueError, match=r"shard 0 .* holds other samples"):
        ScalSelect(model, tokenizer, folder=tmp_path, shard_size=10).fit(pool[::-1])
    (tmp_path / "settings.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="JSON"):
        ScalSelect(model, tokenizer, folder=tmp_path, shard_size=10).fit(pool)


@pytest.mark.parametrize("kind", ["array", "image", "file", "opened file", "tensor"])
def test_samples_with_other_images_are_other_samples(tmp_path, kind):
    from PIL import Image

    from subspan.select.scalselect import _digest_of_samples, _sample

    pixels = np.random.default_rng(0).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    digests = []
    for changed in (0, 0, 1):
        given = pixels + np.uint8(changed)
        path = tmp_path / "image.png"
        if changed or not path.exists():
            Image.fromarray(given).save(path)
        image = {
            "array": given,
            "image": Image.fromarray(given),
            "file": str(path),
            "opened file": Image.open(path),
            "tensor": torch.from_numpy(given),
        }[kind]
        talk = [{"role": "user", "content": "<image> w1"}]
        digests.append(_digest_of_samples([_sample({"id": 1, "messages": talk, "image": image}, 0)]))
    assert digests[0] == digests[1] != digests[2]


def test_shards_without_pickles_and_with_a_missing_one(tmp_path):
    shards = RepresentationShards(tmp_path, {"a": 1})
    shards.write(0, Shard(["x", "y"], torch.tensor([[1.0, 2.0], [torch.nan, torch.nan]]), "d"))
    shards.count = 1
    assert [rows.tolist() for rows in shards] == [[[1.0, 2.0]]]
    assert json.loads((tmp_path / "settings.json").read_text()) == {"a": 1}
    shards.count = 2
    with pytest.raises(ValueError, match="shard 1 is missing"):
        list(shards)


# ---------------------------------------------------------------------- samples that cannot be scored


def test_empty_samples_are_an_error_or_skipped_with_a_warning(model, tokenizer, pool, fitted):
    no_context = {"id": "bare", "messages": [{"role": "user", "content": "w1 w2"}]}
    no_query = {"id": "mute", "messages": [{"role": "user", "content": [{"type": "context", "text": "w1 w2"}]}]}
    with pytest.raises(ValueError, match="'bare': no context tokens"):
        ScalSelect(model, tokenizer).fit([*pool, no_context])
    with pytest.raises(ValueError, match="'mute': no query tokens"):
        ScalSelect(model, tokenizer).fit([*pool, no_query])
    mixed = [*pool[:3], no_context, *pool[3:], no_query]
    with pytest.warns(UserWarning, match=r"2 of 18 samples .* 'bare', 'mute'"):
        scal = ScalSelect(model, tokenizer, on_empty="skip", batch_size=4, shard_size=9).fit(mixed)
    assert np.isnan(scal.scores_[[3, 17]]).all()
    assert np.abs(np.delete(scal.scores_, [3, 17]) - fitted.scores_).max() < 1e-4
    assert not {3, 17} & set(scal.select(1.0).tolist())
    assert set(scal.ranking_[-2:]) == {3, 17}
    with pytest.raises(ValueError, match=r"\[1, 16\]"):
        scal.select(17)


def test_truncation_that_leaves_no_query(model, tokenizer, pool):
    with pytest.raises(ValueError, match="no query tokens within max_length=6"):
        ScalSelect(model, tokenizer, max_length=6).fit(pool)
    with pytest.warns(UserWarning, match="no score"), pytest.raises(ValueError, match="at least 2 samples"):
        ScalSelect(model, tokenizer, max_length=6, on_empty="skip").fit(pool)


def test_an_attention_without_weights_is_refused(tokenizer, pool):
    fused = transformers.LlamaForCausalLM._from_config(text_config(), attn_implementation="sdpa").eval()
    with pytest.raises(ValueError, match="eager"):
        ScalSelect(fused, tokenizer).fit(pool)


def test_a_representation_with_nan_names_the_sample(model, tokenizer, pool):
    broken = transformers.LlamaForCausalLM._from_config(text_config(), attn_implementation="eager").eval()
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinity in the representation of '[ab]_\d+'"):
        ScalSelect(broken, tokenizer).fit(pool)


BAD_SAMPLES = {
    "text": "just text",
    "no messages": {"id": 1},
    "empty": [],
    "no role": [{"content": "w1"}],
    "content of a wrong kind": [{"role": "user", "content": 3}],
    "unknown part": [{"role": "user", "content": [{"type": "audio"}]}],
    "images for a text model": {"messages": [{"role": "user", "content": "w1"}], "images": ["a.png"]},
}


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_malformed_samples_are_refused_with_their_place(model, tokenizer, pool, case):
    with pytest.raises(ValueError, match="sample"):
        ScalSelect(model, tokenizer).fit([*pool[:2], BAD_SAMPLES[case]])


def test_bad_options_and_data_sets(model, tokenizer):
    for option in ({"mass": 0}, {"query": "user"}, {"on_empty": "drop"}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(option))):
            ScalSelect(model, tokenizer, **option)
    with pytest.raises(TypeError, match="dataset"):
        ScalSelect(model, tokenizer).fit("pool.json")
    with pytest.raises(ValueError, match="at least 2 samples"):
        ScalSelect(model, tokenizer).fit([])
    with pytest.raises(NotFittedError, match="fit"):
        ScalSelect(model, tokenizer).select(3)


# ---------------------------------------------------------------------- images


def picture(random):
    return random.integers(0, 255, (40, 50, 3), dtype=np.uint8)


@pytest.fixture
def image_pool():
    random = np.random.default_rng(3)
    return [
        {
            "id": i,
            "image": [picture(random) for _ in range(1 + i % 2)],
            "conversations": [
                {"from": "human", "value": f"<image>\nw{i} w2"},
                {"from": "gpt", "value": "w3 w4"},
                {"from": "human", "value": "w5"},
                {"from": "gpt", "value": "w2 w6"},
            ],
        }
        for i in range(8)
    ]


def test_image_conversations_have_the_published_roles(vision_model, processor, image_pool):
    from PIL import Image

    placeholders = image_token_ids(vision_model, processor)
    assert placeholders == {2, 3, 4}
    assert image_token_ids(vision_model, processor, delimiters=False) == {2}
    images = [Image.fromarray(image) for image in image_pool[1]["image"]]
    user = {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "w1 w2"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "w2"}]}
    talk = image_conversation(processor, [user, answer], images, placeholders)
    tokens = processor.tokenizer.convert_ids_to_tokens(talk.inputs["input_ids"][0])
    named = {
        role: [token for token, inside in zip(tokens, getattr(talk, role)[0].tolist()) if inside]
        for role in ("context", "query", "assistant")
    }
    assert named["context"].count("<start>") == named["context"].count("<end>") == 2
    assert named["context"].count("<image>") == len(named["context"]) - 4 == 32
    assert named["query"] == ["USER:", "w1", "w2", "ASSISTANT:"]
    assert named["assistant"] == ["w2"]
    content = image_conversation(processor, [user, answer], images, placeholders, query="user_content")
    assert int(content.query.sum()) == 2
    cut = image_conversation(processor, [user, answer], images, placeholders, max_length=39)
    assert cut.inputs["input_ids"].shape == (1, 39)
    assert int(cut.context.sum()) == 36
    assert not image_conversation(processor, [user, answer], images, placeholders, max_length=20).context.any()
    with pytest.raises(ValueError, match="2 image parts, got 1"):
        image_conversation(processor, [user, answer], images[:1], placeholders)


def test_images_are_scored_by_what_the_questions_attend_to(vision_model, processor, image_pool):
    scal = ScalSelect(vision_model, processor).fit(image_pool)
    assert scal.block == "model.language_model.layers.0"
    rows = torch.cat(list(scal.representations()))
    from PIL import Image

    for sample, row in zip(image_pool, rows):
        first = [{"type": "image"}] * len(sample["image"]) + [{"type": "text", "text": f"w{sample['id']} w2"}]
        turns = [
            {"role": "user", "content": first},
            *(
                {"role": role, "content": [{"type": "text", "text": text}]}
                for role, text in (("assistant", "w3 w4"), ("user", "w5"), ("assistant", "w2 w6"))
            ),
        ]
        images = [Image.fromarray(image) for image in sample["image"]]
        inputs = processor(
            text=[processor.apply_chat_template(turns, tokenize=False)], images=[images], return_tensors="pt"
        )
        ids = inputs["input_ids"][0]
        context = torch.isin(ids, torch.tensor([2, 3, 4]))
        tokens = processor.tokenizer.convert_ids_to_tokens(ids)
        says = [token == "ASSISTANT:" for token in tokens]
        assistant = torch.zeros_like(context)
        for start, length in zip([i for i, here in enumerate(says) if here], (2, 2)):
            assistant[start + 1 : start + 1 + length] = True
        with torch.no_grad():
            full = vision_model(**inputs, output_attentions=True, output_hidden_states=True)
        assert torch.allclose(row, published(full, ~context & ~assistant, context), atol=1e-6)


def test_a_sample_without_images_is_not_dropped_silently(vision_model, processor, image_pool):
    bare = {"id": "text only", "messages": [{"role": "user", "content": "w1"}]}
    with pytest.raises(ValueError, match="'text only': no context tokens"):
        ScalSelect(vision_model, processor).fit([*image_pool, bare])
    with pytest.warns(UserWarning, match="1 of 9"):
        scal = ScalSelect(vision_model, processor, on_empty="skip").fit([*image_pool, bare])
    assert np.isnan(scal.scores_[-1])


def test_images_from_files_and_in_parts(vision_model, processor, image_pool, tmp_path):
    from PIL import Image

    reference = ScalSelect(vision_model, processor).fit(image_pool).scores_
    missing = {**image_pool[0], "image": str(tmp_path / "missing.png")}
    with pytest.raises(ValueError, match=r"sample '0': .*missing\.png"):
        ScalSelect(vision_model, processor).fit([missing])
    rewritten = []
    for sample in image_pool:
        paths = []
        for number, image in enumerate(sample["image"]):
            path = tmp_path / f"{sample['id']}_{number}.png"
            Image.fromarray(image).save(path)
            paths.append(str(path))
        rewritten.append({**sample, "image": paths})
    assert np.abs(ScalSelect(vision_model, processor).fit(rewritten).scores_ - reference).max() < 1e-9
    parts = [
        [
            {
                "role": "user",
                "content": [
                    *({"type": "image", "image": image} for image in sample["image"]),
                    {"type": "text", "text": f"w{sample['id']} w2"},
                ],
            },
            *(
                {"role": role, "content": text}
                for role, text in (("assistant", "w3 w4"), ("user", "w5"), ("assistant", "w2 w6"))
            ),
        ]
        for sample in image_pool
    ]
    assert np.abs(ScalSelect(vision_model, processor).fit(parts).scores_ - reference).max() < 1e-9


# ---------------------------------------------------------------------- the real model


@pytest.mark.slow
def test_the_language_model_stops_early_with_identical_numbers():
    from subspan.datasets import is_installed, load_language_model
    from subspan.models.attention import block_attention

    if not is_installed("smollm2"):
        pytest.skip("the package with SmolLM2's weights is not installed")
    model, tokenizer = load_language_model("smollm2", attn_implementation="eager")
    talk = [
        {
            "role": "user",
            "content": [
                {"type": "context", "text": "The museum opens at nine and closes at five on weekdays."},
                {"type": "text", "text": "When does it open?"},
            ],
        },
        {"role": "assistant", "content": "At nine."},
    ]
    roles = TokenRoles.from_messages(tokenizer, [talk])
    with torch.no_grad():
        full = model(**roles.batch, output_attentions=True, output_hidden_states=True)
    attention, states = block_attention(model, roles.batch, 0)
    assert torch.equal(attention, full.attentions[0])
    assert torch.equal(states, full.hidden_states[1])
    scal = ScalSelect(model, tokenizer).fit([talk, [talk[0], {"role": "assistant", "content": "At 9."}], talk[:1]])
    expected = published(full, roles.query[0], roles.context[0])
    assert torch.allclose(next(scal.representations())[0], expected, atol=1e-6)
