"""The parts of the protocol of deep subspace clustering, in small."""

import numpy as np
import pytest

pytest.importorskip("lightning", reason="deep clusterers train with Lightning (extra: train)")

from subspan.reproduce import Trials
from subspan.reproduce import deep_subspace_clustering as protocol

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def planted():
    random = np.random.default_rng(0)
    templates = random.random((3, 3, 64)) * (random.random((3, 3, 64)) < 0.3)
    x = np.vstack([random.random((12, 3)) @ part for part in templates]).reshape(36, 8, 8).astype(np.float32)
    small = {"channels": (3,), "kernels": (3,)}
    return protocol.Pictures("planted", x / x.max(), np.repeat(np.arange(3), 12), 3, small, small)


def test_without_data_digits_take_their_place(monkeypatch):
    monkeypatch.delenv("SUBSPAN_DATA", raising=False)
    monkeypatch.setattr(protocol, "data_folder", lambda: None)
    (digits,) = protocol.pictures(quick=True)
    assert digits.x.shape == (120, 8, 8)
    assert digits.x.max() <= 1


def test_every_classic_gets_the_same_post_processing():
    arms = protocol.classics(planted(), range(1))
    assert set(arms) == {"k-means", *protocol._CLASSICS, protocol._ORACLE}
    found = Trials(arms, range(1), lambda arm, seed: arms[arm](seed)).means(of=np.median)
    assert found[protocol._ORACLE] >= max(found["LSR"], 0.9)


def test_the_unstopped_training_says_which_look_is_kept():
    trace = protocol.unstopped(planted(), protocol.Setting(unstopped=120, every=30), 0)
    assert trace.steps == [30, 60, 90, 120]
    assert len(trace.accuracy) == len(trace.modularity) == 4
    assert trace.modularity[trace.kept] == max(trace.modularity)


@pytest.mark.parametrize("better", [True, False])
def test_bars_hold_and_fail(better):
    scores = dict.fromkeys((*protocol._CLASSICS, "k-means", protocol._ORACLE), 0.8)
    scores[protocol._DEEP] = 0.85 if better else 0.7
    trials = Trials(scores, [0], lambda arm, seed: scores[arm])
    trace = protocol.Trace([50, 100], [0.8, 0.7] if better else [0.7, 0.8], [0.6, 0.5], 0)
    outcome = protocol.outcome([planted()], protocol.Setting(), {"planted": trials}, [], trace)
    assert outcome.holds is better
    assert [check.holds for check in outcome.checks] == [better] * 3
