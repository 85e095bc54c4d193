"""A trainer that says nothing and leaves everything as it was."""

import logging
import signal
import warnings

import pytest
import torch

pytest.importorskip("lightning", reason="the trainer is Lightning's (extra: train)")

from lightning import LightningModule

from subspan.align import LambdaOrthogonalAdapter
from subspan.nn.training import batch_rows, keep_best, quiet_trainer


class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_index=0):
        warnings.warn("a step of one's own", stacklevel=1)
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_is_silent_inside_and_itself_again_outside(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    level = logging.getLogger("lightning.pytorch").level
    handler = logging.StreamHandler()
    logging.getLogger("lightning.pytorch").addHandler(handler)
    try:
        with pytest.warns(UserWarning, match="of one's own") as caught, quiet_trainer(max_epochs=2) as trainer:
            trainer.fit(Line(), torch.utils.data.DataLoader(torch.ones(8, 2), 4))
    finally:
        logging.getLogger("lightning.pytorch").removeHandler(handler)
    assert trainer.current_epoch == 2
    assert {str(warning.message) for warning in caught} == {"a step of one's own"}
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert logging.getLogger("lightning.pytorch").level == level


def test_levels_return_after_an_error_and_options_win():
    level = logging.getLogger("lightning.fabric").level
    context = quiet_trainer(max_epochs=1, enable_progress_bar=True)
    assert context.__enter__().progress_bar_callback is not None
    assert logging.getLogger("lightning.fabric").level == logging.ERROR
    assert context.__exit__(RuntimeError, RuntimeError("stop"), None) is not True
    assert logging.getLogger("lightning.fabric").level == level


def test_an_interrupt_is_an_interrupt_and_the_next_one_is_heard():
    # Where tests were started in the background of a shell, Ctrl-C is ignored from the start.
    before, handler = signal.getsignal(signal.SIGINT), signal.default_int_handler
    signal.signal(signal.SIGINT, handler)
    model = Line()
    model.training_step = lambda batch, batch_index=0: signal.raise_signal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt), quiet_trainer(max_epochs=1) as trainer:
            trainer.fit(model, torch.utils.data.DataLoader(torch.ones(8, 2), 4))
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_few_rows_come_in_so_small_batches_that_an_epoch_has_steps_enough():
    assert [batch_rows(n, None, 256) for n in (10, 100, 1437, 2400, 100_000)] == [10, 32, 44, 75, 256]
    assert [batch_rows(n, None, 512) for n in (16_000, 100_000)] == [500, 512]
    assert [batch_rows(n, 128, 256) for n in (50, 1000)] == [50, 128]


def test_an_adapter_whose_loss_overflows_names_the_step():
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"the loss is .* at step [1-9]"):
        LambdaOrthogonalAdapter("affine", learning_rate=1e30, epochs=3, random_state=0).fit(x, x)


def test_the_weights_of_the_best_epoch_are_kept():
    class Scheduled(Line):
        def on_train_epoch_start(self):
            torch.nn.init.constant_(self.layer.weight, self.current_epoch)

        def training_step(self, batch, batch_index=0):
            return 0 * self.layer(batch).sum()

        def validation_step(self, batch, batch_index=0):
            self.log("val_loss", [3.0, 1.0, 2.0][self.current_epoch])

    module, rows = Scheduled(), torch.utils.data.DataLoader(torch.ones(4, 2), 4)
    with quiet_trainer(max_epochs=3, callbacks=[keep_best(module.layer)]) as trainer:
        trainer.fit(module, rows, rows)
    assert module.layer.weight.unique().tolist() == [1.0]
