from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, Timer
from lightning.pytorch.loggers import CSVLogger

from lit_scale.trainers import callbacks_of, writes_logs
from tests.support.data import loader
from tests.support.networks import build
from tests.support.training import quiet_trainer

pytestmark = [pytest.mark.filterwarnings("ignore")]


class Late(Timer):
    pass


def test_callbacks_of_a_class_and_its_subclasses_come_in_order(tmp_path: Path) -> None:
    callbacks = [LambdaCallback(), Timer(), LambdaCallback(), Late()]
    trainer = quiet_trainer(tmp_path, callbacks=callbacks)
    assert callbacks_of(trainer, Timer) == [callbacks[1], callbacks[3]]
    assert callbacks_of(trainer, Late) == [callbacks[3]]
    assert callbacks_of(trainer, EarlyStopping) == []
    assert callbacks_of(trainer, Callback)[:4] == callbacks


@pytest.mark.parametrize("every", [0, 1, 3])
def test_logs_are_said_to_be_written_where_lightning_writes_them(every: int, tmp_path: Path) -> None:
    said: list[int] = []

    class Asks(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if writes_logs(trainer):
                said.append(trainer.global_step)

    logger = CSVLogger(tmp_path, name="log", version="")
    trainer = quiet_trainer(tmp_path, max_steps=7, callbacks=[Asks()], logger=logger, log_every_n_steps=every)
    trainer.fit(build("plain_torch"), loader("plain_torch"))
    written = [int(row["step"]) for row in logger.experiment.metrics]
    rows = Path(logger.log_dir, "metrics.csv")
    column = rows.read_text().splitlines() if rows.exists() else ["step"]
    steps = [int(line.split(",")[column[0].split(",").index("step")]) for line in column[1:]]
    assert said == sorted({*written, *steps})
    assert said == {0: [], 1: list(range(7)), 3: [2, 5]}[every]
