"""Windows with labels: cut, averaged and scaled as said, people kept apart, and the files that authors distribute."""

import numpy as np
import pytest
from scipy.io import savemat

from subspan.datasets import LabelledWindows, labelled_windows, load


def test_recordings_of_a_watch_are_halved_and_cut(tmp_path):
    (tmp_path / "watch_har").mkdir()
    signal = np.stack([np.arange(700), -np.arange(700)], 1).astype(np.int16)
    arrays = {"signal": signal, "scale": np.array([0.5, 2.0], np.float32), "offsets": np.array([0, 401, 700])}
    about = {
        "y": np.array([1, 0]),
        "subject": np.array([7, 9]),
        "channels": ["a", "b"],
        "classes": ["c", "d"],
        "fs": 50,
    }
    np.savez(tmp_path / "watch_har" / "watch_har.npz", **arrays, **about)
    found = labelled_windows("watch_har", tmp_path)
    assert found.x.shape == (4, 2, 100)  # starts 0, 50, 100 of 200 samples; 0 of 149
    assert found.rate == 25
    np.testing.assert_allclose(found.x[1, 0, :2], [0.5 * 100.5, 0.5 * 102.5])
    np.testing.assert_allclose(found.x[3, 1, 0], -2 * 401.5)
    assert found.y.tolist() == [1, 1, 1, 0]
    assert found.people.tolist() == [7, 7, 7, 9]


def test_heart_rates_belong_to_their_windows_and_the_electrocardiogram_is_left_out(tmp_path):
    folder = tmp_path / "troika_hr"
    folder.mkdir()
    for number, length in ((1, 1250), (4, 1600)):
        signal = np.tile(np.arange(length, dtype=float), (6, 1))
        signal[0] = 1e6
        savemat(folder / f"DATA_0{number}_TYPE02.mat", {"sig": signal})
        savemat(folder / f"DATA_0{number}_TYPE02_BPMtrace.mat", {"BPM0": np.array([[70.0 + number], [80.0 + number]])})
    assert load("troika_hr", tmp_path)["sig_01_TYPE02"].shape == (6, 1250)
    found = labelled_windows("troika_hr", tmp_path)
    assert found.x.shape == (4, 5, 200)
    assert float(found.x.max()) < 2000
    np.testing.assert_allclose(found.x[1, 0, 0], 50 * 5 + 2)
    assert found.y.tolist() == [71, 81, 74, 84]
    assert found.people.tolist() == [1, 1, 4, 4]


def uci(folder, rows=3):
    root = folder / "uci_har" / "UCI HAR Dataset"
    for split, extra in (("train", 0), ("test", 1)):
        (root / split / "Inertial Signals").mkdir(parents=True)
        for place, kind in enumerate(("body_acc", "body_gyro", "total_acc")):
            for axis in "xyz":
                values = np.full((rows + extra, 128), place + "xyz".index(axis) / 10)
                np.savetxt(root / split / "Inertial Signals" / f"{kind}_{axis}_{split}.txt", values)
        np.savetxt(root / split / f"y_{split}.txt", 1 + np.arange(rows + extra) % 2, fmt="%d")
        np.savetxt(root / split / f"subject_{split}.txt", np.arange(rows + extra) + 10 * extra, fmt="%d")
    (root / "activity_labels.txt").write_text("1 WALKING\n2 LAYING\n")
    return root


def test_the_phone_s_text_files_are_read_with_their_people(tmp_path):
    root = uci(tmp_path)
    found = labelled_windows("uci_har", tmp_path)
    assert found.x.shape == (7, 9, 128)
    np.testing.assert_allclose(found.x[0, :, 0], [0, 0.1, 0.2, 1, 1.1, 1.2, 2, 2.1, 2.2], rtol=1e-6)
    assert found.channels[4] == "body_gyro_y"
    assert found.classes == ("walking", "laying")
    assert found.people.tolist() == [0, 1, 2, 10, 11, 12, 13]
    assert found.split(3).tolist() == [False] * 3 + [True] * 4
    (root / "train" / "y_train.txt").write_text("1\n2\n")
    with pytest.raises(ValueError, match=r"files of 'train' in .* have different numbers of rows"):
        labelled_windows("uci_har", tmp_path)


def test_people_who_are_tested_on_are_not_learnt_from():
    people = np.repeat(np.arange(10), 3)
    windows = LabelledWindows(np.zeros((30, 1, 16)), people % 2, people, None, ("a",), ("b", "c"), 1.0)
    for seed in range(4):
        test = windows.split(seed)
        assert test.sum() == 9
        assert not set(people[test]) & set(people[~test])
    assert (windows.split(0) != windows.split(1)).any()
    with pytest.raises(ValueError, match=r"share: 0.01 of 10 people leaves nobody on one side"):
        windows.split(0, share=0.01)
    with pytest.raises(ValueError, match="name: expected one of"):
        labelled_windows("usc_had")
