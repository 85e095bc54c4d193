"""Protocols run whole, on planted data that is small enough for a test."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("lightning", reason="protocols train with Lightning (extra: train)")

import itertools

from subspan.datasets import LabelledWindows, attributed_block_model
from subspan.models import SentenceEncoder
from subspan.reproduce import Table
from subspan.reproduce.materials import JointSpace, LabelledImages, Views
from subspan.reproduce.materials.text_tasks import TextTask
from subspan.select import LeverageSelector

pytestmark = pytest.mark.filterwarnings("ignore")

EMPTY = Table("planted", ["a"], [])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def subspaces(n: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of three planes of three dimensions, and which."""
    random = np.random.default_rng(seed)
    parts = [random.normal(size=(n // 3, 3)) @ np.linalg.qr(random.normal(size=(d, 3)))[0].T for _ in range(3)]
    return np.concatenate(parts), np.repeat(np.arange(3), n // 3)


def simvq(module: Any, patch: Any) -> None:
    x = normal(512, 3) @ normal(3, 192, seed=1)
    patch(module, "material", lambda: ("planted", x, x[:256]))
    for name, size in {"BATCH": 64, "MANY": 64, "FEW": 8, "HIDDEN": 16}.items():
        patch(module, name, size)


def ulsam(module: Any, patch: Any) -> None:
    def tail(classes: int) -> nn.Sequential:
        blocks = [nn.Sequential(nn.Conv2d(112, 112, 3, padding=1), nn.Conv2d(112, 112, 1)) for _ in range(2)]
        return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(112, classes))

    rows = np.arange(96)
    data = LabelledImages("planted", None, rows % 2, rows[:64], rows[64:], ("a", "b"))
    y = {part: torch.from_numpy(each) for part, each in data.split(data.labels).items()}
    x = {part: normal(len(each), 112, 2, 2) + each[:, None, None, None] for part, each in y.items()}
    patch(module, "material", lambda most: (data, x, y))
    patch(module, "tail", tail)


def lambda_orthogonality(module: Any, patch: Any) -> None:
    rows = np.arange(480)
    centers = normal(8, 12)[rows % 8]

    class Planted(LabelledImages):
        def features(self, model: str = "", size: int = 128) -> torch.Tensor:
            newer = model == module.NEW
            return (centers + (0.6 if newer else 1.2) * normal(480, 12, seed=newer + 1)) @ normal(
                12, 20, seed=newer + 3
            )

    data = Planted("planted", None, rows % 8, rows[:320], rows[320:], tuple("abcdefgh"))
    load = module.load
    patch(module, "labelled_images", lambda source: data)
    patch(module, "is_available", lambda name: False)
    patch(module, "load", lambda setting, seed, quick: load(setting, seed))
    patch(module, "QUICK", module.Setting(12, 6, 120, 160, 80, 80, 1, 1))


def s2cag(module: Any, patch: Any) -> None:
    graph = attributed_block_model(150, 3, mean_degree=10, n_attributes=120, words=8, random_state=0)
    patch(module, "data_folder", lambda: "planted")
    patch(module, "load_graph", lambda name: graph)
    patch(module, "_scaling", lambda sizes, seed: (EMPTY, 2.0))


def subspace_clustering(module: Any, patch: Any) -> None:
    patch(module, "data_folder", lambda: "planted")
    patch(module, "pictures", lambda name, most, seed: module.Pictures(name.upper(), *subspaces(75, 15), 3))


def scalselect(module: Any, patch: Any) -> None:
    rows = np.random.default_rng(0).permutation(subspaces(300, 20)[0].astype(np.float32) + 20)
    chosen = LeverageSelector().fit(rows)
    records = [{"text": "on Monday " * (i % 3) + "1 " * (i % 11) + "word", "label": "ab"[i % 2]} for i in range(450)]
    found = SimpleNamespace(scores_=chosen.scores_, k_=chosen.k_, ranking_=chosen.ranking_)
    found.select = lambda count: chosen.ranking_[: count if count > 1 else round(300 * count)]
    deep = normal(450, 8).numpy()
    model = (SimpleNamespace(), lambda text: {"input_ids": text.split()})
    patch(module, "load_language_model", lambda *_, **__: model)
    patch(module, "_records", lambda *_: ("planted", records[:300], records[300:], module.NEWS))
    patch(module, "_represent", lambda *_: (found, rows))
    patch(module, "_deep", lambda *_: (deep, deep[::-1].copy(), deep[:, 0]))
    patch(module, "_scaling", lambda *_: (EMPTY, 1.0, 0.0))


def subspacead(module: Any, patch: Any) -> None:
    facts = {f"{arm} {kind}": 0.9 for arm in module.METHODS for kind in ("pixel", "image", "aupro")}
    facts |= {f"{arm} {what}": 1.0 for arm in ("ours", "bank") for what in ("seconds", "storage")}
    load = module.load
    patch(module, "load", lambda name: dict.fromkeys(("brick", "grass")) if name == "textures" else load(name))
    patch(module, "_grid", lambda *_: None)
    patch(module, "pasted_defects", lambda *_, **__: None)
    patch(module, "texture_trial", lambda *_: {**facts, "rank": 3, "forest image": 0.5})


def sts(module: Any, patch: Any) -> None:
    prototypes, names = normal(10, 20) + 0.5, [f"thing {number}" for number in range(10)]

    class Encoder(SentenceEncoder):
        def __init__(self, *_: Any) -> None: ...

        def encode(self, texts: list[str]) -> np.ndarray:
            return np.stack([prototypes[int("".join(filter(str.isdigit, text)))].numpy() for text in texts])

    def views(draw: Any, say: Callable[[float], None]) -> Views:
        y = torch.arange(draw.images) % 10
        noise = normal(draw.images, draw.views, 20, seed=len(draw.shift))
        return Views((prototypes[y][:, None] + (0.1 if draw.shift == "clean" else 1.5) * noise).half(), y)

    patch(module, "load_sentence_encoder", tuple)
    patch(module, "SentenceEncoder", Encoder)
    patch(module, "is_available", lambda name: True)
    patch(module, "_cifar_linear", lambda *_: JointSpace("planted", lambda x: x, lambda x: x, 20.0))
    patch(module, "drawn_views", views)
    patch(module, "named_pictures", lambda *_: (None, None, names))
    patch(module, "cost", lambda *_: (EMPTY, 0.1, 50.0))


def concrete_merging(module: Any, patch: Any) -> None:
    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, batch: Any) -> torch.Tensor:
            return nn.functional.normalize(self.layer(batch[0]), dim=-1)

    def tasks(fit: int, held: int, seed: int) -> Any:
        torch.manual_seed(seed)
        found = {}
        for number, task in enumerate(("first", "second")):
            x, y = normal(fit + held, 6, seed=number), torch.arange(fit + held) % 2
            x[:, number] += 2 * y
            columns = (x, torch.zeros(len(x)), y)
            found[task] = TextTask(*(tuple(c[part] for c in columns) for part in (slice(fit), slice(fit, None))))
        return "planted", Base(), found

    patch(module, "text_tasks", tasks)
    patch(module, "RATE", 3e-2)


def small_language_model(tied: bool = False) -> tuple[Any, Any]:
    """An untrained Llama of four blocks that reads letters, and its tokenizer."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    characters = {chr(code): index for index, code in enumerate(range(32, 127))} | {"\n": 95, "<pad>": 96}
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel(characters, unk_token="~"))
    split.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=split, pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=97, tie_word_embeddings=tied, **sizes)
    return transformers.LlamaForCausalLM(config), tokenizer


def resrl(module: Any, patch: Any) -> None:
    patch(module, "load_language_model", lambda name: small_language_model(tied=True))
    patch(module, "written", lambda: None)
    patch(module, "QUICK", module.Setting(6, 2, 1000))


def decoupling(module: Any, patch: Any) -> None:
    words = ["".join(chr(97 + (7 * i + 3 * j) % 26) for j in range(5)) for i in range(60)]
    # Varieties by a letter that each has often.
    varieties = {name: [f"{word} {letter * 4} {word[::-1]}" for word in words] for name, letter in zip("pqr", "xyz")}
    pairs = [(f"{word} xxx", f"{word} yyy") for word in words]
    patch(module, "load_language_model", lambda name: small_language_model(tied=True))
    patch(module, "material", lambda: module.Material("planted", varieties, (pairs[:40], pairs[40:])))
    patch(module, "PROBE", {**module.PROBE, "epochs": 6, "learning_rate": 2e-2})
    patch(module, "QUICK", module.Setting(2, 4, 4, 8, 1.0, 2, 12, (0, 3), 24, 1, 1e-3, 4))


def sae_manifolds(module: Any, patch: Any) -> None:
    texts = ["".join(chr(97 + (i * j + 3 * j) % 26) for j in range(40)) for i in range(60)]
    concepts = {"temperature": module.CONCEPTS["temperature"][:20], "years": module.CONCEPTS["years"][:30]}
    patch(module, "load_language_model", lambda: small_language_model())
    patch(module, "background", lambda: ("planted", texts))
    patch(module, "CONCEPTS", concepts)
    patch(module, "QUICK", module.Setting(1, 16, 32, 2000, 1500, 1, (2, 4), 1, 40, 32, 48, 6, 1, 400))


def reglu(module: Any, patch: Any) -> None:
    patch(module, "load_language_model", lambda name: small_language_model())
    patch(module, "is_available", lambda name: False)
    patch(module, "kept", lambda layers, kind, key, learn: (learn(), layers.eval().requires_grad_(False)))
    patch(module, "QUICK", module.Setting(2, 1, 2, 2, 1e-2, 2, 1e-2, 2, 2, 0, 1))


def safety_subspaces(module: Any, patch: Any) -> None:
    model, tokenizer = small_language_model()
    # Numbers and letters: what the two kinds of prompts share is little.
    asked = [f"tell {chr(97 + i % 26) * 6}" for i in range(40)]
    sums = [(f"{i} + {i} =", f"{2 * i}") for i in range(10, 50)]
    data = module.Material("planted", (asked[:30], asked[30:]), (asked[::-1], asked), (sums[:30], sums[30:]))
    patch(module, "load_language_model", lambda name: (model, tokenizer))
    patch(module, "material", lambda: data)
    patch(module, "QUICK", module.Setting(2, 30, 40, 4, 3e-3, 8, (0.25,), ("same",), 2, 1))


def cospadi(module: Any, patch: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    split.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=split, pad_token="w0")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    language = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **sizes)).eval()
    encoder = transformers.BertModel(transformers.BertConfig(vocab_size=40, **sizes)).eval()
    drawn = torch.randint(40, (80, 12), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [" ".join(f"w{i}" for i in row) for row in drawn]
    pairs = [{"sentence1": a, "sentence2": b, "score": i % 5} for i, (a, b) in enumerate(itertools.pairwise(texts))]
    text = " ".join(texts)
    data = {"wikitext2": {"train": text, "test": text}, "stsb": {"train": pairs, "test": pairs}}
    patch(module, "load_language_model", lambda name: (language, tokenizer))
    patch(module, "load_sentence_encoder", lambda: (encoder, tokenizer))
    patch(module, "is_available", lambda name: True)
    patch(module, "load", data.__getitem__)
    patch(module, "QUICK", module.Sizes(8, 4, 48, (0.3,), (0.3,), 48, 20, 1, 1, 1, "", 1))


def ast_probe(module: Any, patch: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    characters = {chr(code): index for index, code in enumerate(range(32, 127))} | {"<s>": 95, "<pad>": 96}
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel(characters, unk_token="~"))
    split.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    special = {"bos_token": "<s>", "pad_token": "<pad>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=split, **special)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=97, **sizes)).eval()
    sources = [f"{a} = {b}({c}, -{a})" for a in "abcd" for b in "efgh" for c in "ijklm"]
    trees = module.code_trees(sources, parser="ast").trees
    patch(module, "corpus", lambda seed: module.Corpus("planted", trees[:-10], trees[-10:]))
    small = {
        "layers": (0, 1, 2),
        "random_layers": (1,),
        "snippets": (50, 10, 10),
        "rank": 12,
        "ranks": (8,),
        "epochs": 6,
        "seeds": 2,
    }
    patch(module, "QUICK", module.QUICK._replace(load=lambda: (model, tokenizer), **small))


def icl_circuit(module: Any, patch: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    prompts = [module.WORDS, *module.SETS.values()]
    own = {f"{prompt.template.replace('{label}', word)}" for prompt in prompts for word in prompt.words.values()}
    words = [*" ".join(own).replace("{text}", " ").split(), *itertools.chain(*module.CATEGORIES.values())]
    known = {word: number for number, word in enumerate(dict.fromkeys(["<pad>", "<u>", *words]))}
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, "<u>"))
    split.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=split, pad_token="<pad>", unk_token="<u>")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(known), **sizes, initializer_range=0.5)
    model = transformers.LlamaForCausalLM(config).eval()

    class Encoder(SentenceEncoder):
        def __init__(self, *_: Any) -> None: ...

        def encode(self, texts: list[str]) -> np.ndarray:
            return normal(len(texts), 8).numpy()

    records = [{"text": f"a question of number {i}", "label": list(module.TREC)[i % 5]} for i in range(90)]
    patch(module, "load_language_model", lambda: (model, tokenizer))
    patch(module, "load_sentence_encoder", tuple)
    patch(module, "SentenceEncoder", Encoder)
    patch(module, "is_available", lambda name: True)
    patch(module, "load", lambda name: records)
    patch(module, "QUICK", module.QUICK._replace(few=6, neighbours=3, seeds=2))


def labelled(n: int, classes: int, spread: float) -> LabelledImages:
    """Pictures whose class is where they are bright, and features of which some columns are the class's."""
    rows = np.arange(n)
    labels = rows % classes
    images = np.random.default_rng(0).integers(60, size=(n, 16, 16)).astype(np.uint8)
    for row, label in zip(rows, labels):
        images[row, 4 * label : 4 * label + 4, 2:14] += 150

    class Planted(LabelledImages):
        def features(self, model: str = "", size: int = 128) -> torch.Tensor:
            noise = normal(len(self.labels), 12) * torch.cat([torch.full((4,), 0.5), torch.full((8,), spread)])
            return noise + 2 * torch.eye(4, 12)[torch.from_numpy(self.labels)]

    cut = 2 * n // 3
    return Planted("planted", images, labels, rows[:cut], rows[cut:], tuple("abcd"))


def hydra(module: Any, patch: Any) -> None:
    patch(module, "labelled_images", lambda source: labelled(96, 4, 0.5))
    patch(module, "QUICK", module.Sizes(64, 32, 1, 64, 32, 1, 1))


def dynamic_subspace_learners(module: Any, patch: Any) -> None:
    patch(module, "labelled_images", lambda source: labelled(180, 4, 3.0))
    patch(module, "is_available", lambda name: False)
    for name, value in {"WIDTH": 16, "RATE": 3e-2, "PATIENCE": 1, "FIXED": {"2 fixed learners": 2}}.items():
        patch(module, name, value)
    patch(module, "QUICK", module.Sizes(120, 60, 5, 1, 1, 1))


def sub_jepa(module: Any, patch: Any) -> None:
    patch(module, "QUICK", module.QUICK._replace(episodes=(12, 8, 8), steps=4, pairs=4, budget=20, rounds=2))


def rep4ex(module: Any, patch: Any) -> None:
    def windows(count: int, seed: int) -> Any:
        return module.acted_vectors(count, 2, seed)

    patch(module, "acted_windows", windows)
    patch(module, "LEVELS", {name: module.LEVELS[name] for name in ("strength 0", "noise 0.3")})
    patch(module, "QUICK", module.Sizes(100, 60, 2, 2, (1, 2), 1))


def xfactors(module: Any, patch: Any) -> None:
    def judge(self: Any, data: Any, epochs: int, seed: int) -> None:
        self.values = data.sizes()

    def agreement(self: Any, x: torch.Tensor, factors: Any) -> dict[str, float]:
        return {name: float(bool(x.isfinite().all())) for name in factors}

    patch(module, "WIDTH", 2)
    patch(module.Judge, "__init__", judge)
    patch(module.Judge, "agreement", agreement)
    patch(module, "QUICK", module.Sizes(200, 120, 1, 1, 20, 1))


def information_koopman(module: Any, patch: Any) -> None:
    turn, shape = torch.linspace(0, 12, 130), torch.randn(2, 2, 16, 16)
    flow = (turn.cos().view(-1, 1, 1, 1) * shape[0] + turn.sin().view(-1, 1, 1, 1) * shape[1]).numpy()
    patch(module, "vortex_street", lambda frames, progress: flow)
    patch(module, "WAKE_WIDTH", 2)
    patch(module, "QUICK", module.Sizes(4, 2, 70, 40, 60, 70, 2, 1))


def sifo(module: Any, patch: Any) -> None:
    patch(module, "GRID", (4, 2))
    streets = tuple(module.street_canyon(users=60, grid=(4, 2), random_state=seed) for seed in range(2))
    patch(module, "material", lambda quick, progress: ("planted", streets))
    patch(module, "QUICK", module.Sizes(4, 16, 4, 120, 1))


def frame_projections(module: Any, patch: Any) -> None:
    rows, draws = np.arange(60), np.random.default_rng(0)
    angle = (0.5 + 0.8 * (rows % 2))[:, None, None] * np.arange(32) + draws.uniform(0, 6, (60, 2, 1))
    x = (np.sin(angle) + 0.1 * draws.normal(size=angle.shape)).astype(np.float32)

    def planted(name: str) -> LabelledWindows:
        y, classes = (60.0 + rows % 2, ()) if name == "troika_hr" else (rows % 2, ("slow", "fast"))
        return LabelledWindows(x, y, rows // 6, None, ("a", "b"), classes, 25.0)

    patch(module, "labelled_windows", planted)
    patch(module, "find_spec", lambda name: None)
    for name, size in {"DIM": 8, "WIDTH": 2, "SCALES": 6, "BATCH": 20}.items():
        patch(module, name, size)
    patch(module, "SHARES", {"1 %": (0.2, 1)})
    patch(module, "QUICK", module.Sizes(("uci_har", "troika_hr"), 42, 18, 1, 1, 1))


# Checks that hold on the planted data, whatever the seed.
PLANTED: dict[Callable[[Any, Any], None], set[str]] = {
    simvq: {"more codes reconstruct better"},
    ulsam: {"multiply-adds drop"},
    lambda_orthogonality: {"a rotation changes nothing of the new model"},
    s2cag: {"unseen nodes are clustered like seen ones"},
    subspace_clustering: {"ORL: a self-expressive method beats k-means"},
    scalselect: {"equal to the full decomposition", "without centring the rank collapses: one direction"},
    subspacead: set(),
    reglu: set(),
    safety_subspaces: {"updates that were forced apart are told apart", "and less without their mean"},
    resrl: {"there is something to spare: right answers fall with wrong ones"},
    decoupling: {"every estimate of the penalty finds a subspace"},
    sts: {"cost of prompt tuning", "AdamW's step depends on the basis"},
    concrete_merging: {"there is something to merge"},
    hydra: {"something is learnt"},
    dynamic_subspace_learners: {"metric learning beside none"},
    xfactors: {"the judge knows the factors", "swapped factors follow"},
    frame_projections: {"activities can be read"},
    sub_jepa: {"every goal can be reached"},
    cospadi: {"lower errors than whitened SVD", "data are needed"},
    ast_probe: {"trees come back from their tuples"},
    sae_manifolds: {"model: PCA is the upper bound"},
    rep4ex: {"and the test says so"},
    icl_circuit: {"SmolLM2: and nowhere else"},
    information_koopman: {"more entropy, more directions"},
    sifo: {"spectra of labels count", "digits: the bank beside one subspace for all"},
}


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.__name__)
def test_a_protocol_runs_whole_on_planted_data(
    planted: Callable[[Any, Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"subspan.reproduce.{planted.__name__}")
    planted(module, monkeypatch.setattr)
    said: list[float] = []
    outcome = module.protocol(quick=True, seed=0, progress=lambda message, fraction: said.append(fraction))
    assert said[0] >= 0
    assert said == sorted(said)
    assert said[-1] <= 1
    assert len({(check.name, check.metric) for check in outcome.checks}) == len(outcome.checks)
    judged = [check for check in [outcome.main, *outcome.checks] if check.quick]
    assert judged
    assert {check.name for check in outcome.checks if check.holds} >= PLANTED[planted]
