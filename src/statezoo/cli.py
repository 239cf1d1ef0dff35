"""``statezoo fit | validate | test | predict``: LightningCLI with our models, data and defaults."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from traceback import walk_tb
from typing import Any, NoReturn

from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

import statezoo.datamodules as datamodules
import statezoo.lightning_modules as lightning_modules
from statezoo import arguments as args_
from statezoo import resume
from statezoo.lightning_modules import callbacks, checkpoint, checkpoints, report, tables
from statezoo.lightning_modules.run_log import RunLog
from statezoo.main import RUN
from statezoo.parser import FriendlyErrors, fail

log = logging.getLogger(__name__)

DEFAULT_STEPS = 1000
"""Optimiser steps where neither steps, epochs nor time are given."""

TRAINER = {
    "default_root_dir": "runs",
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": None,
    "val_check_interval": None,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}

INNER = {"LabelTask", "OneMixer", "TokenTask"}
"""Names of models that are bases of others alone."""

CONTINUES = {
    "DNA": "dna generate --model {} --prompt ATG --out generated.fa",
    "Music": "music continue --model {} --prompt theme.mid --out-dir out",
}
"""How to write with a language model, where its symbols are no text."""

KINDS: dict[type, str] = {LightningModule: "model", LightningDataModule: "data"}
BASES: dict[str, type] = {
    "data": LightningDataModule,
    "callbacks": Callback,
    "logger": Logger,
    "strategy": Strategy,
}

set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


class Parser(FriendlyErrors, LightningArgumentParser):
    """LightningCLI's parser with short errors."""

    def add_class_arguments(self, theclass: Any, nested_key: str | None = None, **more: Any) -> Any:
        """Remember of which part these are the settings."""
        if nested_key is None and isinstance(theclass, type):
            found = [kind for base, kind in KINDS.items() if issubclass(theclass, base)]
            self.part = f"{found[0]} {theclass.__name__}" if found else ""
        return super().add_class_arguments(theclass, nested_key, **more)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ask for the class where settings came without one."""
        for base, kind in KINDS.items():
            if self.part == f"{kind} {base.__name__}":
                self.part, message = "", f"arguments are required: {kind}"
        super().error(message, ex)

    def known_words(self, where: str) -> Iterable[str]:
        """Return names of classes where a class belongs, and of settings elsewhere."""
        last = where.rpartition(".")[2]
        if last == "model":
            return {cls.__name__ for cls in _below(lightning_modules.Task)} - INNER
        base = BASES.get(last)
        return super().known_words(where) if base is None else {c.__name__ for c in _below(base)}


def _below(cls: type) -> Iterator[type]:
    subclasses: list[type] = cls.__subclasses__()
    for sub in subclasses:
        yield sub
        yield from _below(sub)


class SaveConfig(SaveConfigCallback):
    """Save the settings of a run beside its checkpoints: ``config.yaml``, or ``test.yaml`` etc."""

    def __init__(self, parser: Any, config: Any, **kwargs: Any) -> None:
        super().__init__(parser, config, overwrite=True, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the name by what is run, so that a test never overwrites a fit's file."""
        name = trainer.state.fn.value if trainer.state.fn else "config"
        self.config_filename = "config.yaml" if name == "fit" else f"{name}.yaml"
        super().setup(trainer, pl_module, stage)


class StateZooCLI(LightningCLI):
    """The command line of models and data."""

    run_folder: Path | None = None
    """The run that goes on, where it writes."""

    def __init__(self, arguments: Sequence[str]) -> None:
        settings = {"parser_mode": "omegaconf+", "allow_abbrev": False}
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=SaveConfig,
            trainer_defaults=TRAINER,
            seed_everything_default=0,
            parser_kwargs={"prog": "statezoo", **settings, **{name: settings for name in RUN}},
            parser_class=Parser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=list(arguments),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add our own groups, and let the data say which symbols and classes there are."""
        parser.add_argument(
            "--vars", type=dict[str, Any], default={}, help="Values for ${vars.x} in configs."
        )
        parser.add_argument(
            "--name", type=str | None, help="Folder under runs/; default from model and data."
        )
        parser.add_lightning_class_args(checkpoints.Checkpoints, "checkpoints")
        parser.add_lightning_class_args(callbacks.ExportHub, "export")
        parser.link_arguments(
            "data.vocab_size", "model.init_args.vocab_size", apply_on="instantiate"
        )
        for key, find in (("complement", self.complement), ("class_names", self.class_names)):
            parser.link_arguments(
                "data", f"model.init_args.{key}", compute_fn=find, apply_on="instantiate"
            )

    def complement(self, data: LightningDataModule) -> list[int] | None:
        """Complements of the data's symbols, if it knows them, else those of the checkpoint."""
        return self._of_data(data, "complement")

    def class_names(self, data: LightningDataModule) -> list[str] | None:
        """Names of the data's classes, if it has any, else those of the checkpoint."""
        return self._of_data(data, "class_names")

    def _of_data(self, data: LightningDataModule, key: str) -> list[Any] | None:
        found = getattr(data, key, None) or self.saved.get(key)
        return list(found) if found else None

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> Any:
        """Add what one subcommand alone has."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_argument(
                "--out", type=str | None, help="CSV file; default predictions.csv in the run."
            )
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; a wrong interpolation is told like any other mistake."""
        from omegaconf.errors import OmegaConfBaseException

        try:
            self.config = parser.parse_args(args)
        except OmegaConfBaseException as error:
            key = re.sub(
                r"key '\.+", "key '", str(error).partition(" (resolved")[0].splitlines()[0]
            )
            parser.error(key)

    def _checkpoint(self) -> str | None:
        """Return the path of the checkpoint that was asked for."""
        path: str | None = self.config[self.subcommand].get("ckpt_path")
        return None if path in args_.KEYWORDS else path

    def _parse_ckpt_path(self) -> None:
        """Leave the settings as they were given; Lightning would let the checkpoint's win."""

    def _runs(self) -> Path:
        """Return the folder of the runs of this name."""
        config = self.config[self.subcommand]
        classes = (config[part].class_path.rpartition(".")[2] for part in ("model", "data"))
        name = config.name or "-".join(classes).lower()
        return Path(config.trainer.default_root_dir or "runs", name)

    def _resume(self) -> None:
        """Find the checkpoint to go on from, and the run's folder to go on in."""
        config = self.config.fit
        found = resume.resume(config.ckpt_path, self._runs(), named=config.name is not None)
        config.ckpt_path, self.run_folder = found

    def before_instantiate_classes(self) -> None:
        """Fill in how long to train and how often to validate, and look into the checkpoint."""
        if self.subcommand == "fit":
            self._resume()
        path, trainer = self._checkpoint(), self.config[self.subcommand].trainer
        args_.check_strategy(trainer.strategy)
        self.saved = checkpoint.read(path).get("hyper_parameters", {}) if path else {}
        if trainer.max_steps == -1 and trainer.max_epochs is None and trainer.max_time is None:
            trainer.max_steps = DEFAULT_STEPS
        if trainer.val_check_interval is None and trainer.check_val_every_n_epoch is None:
            if trainer.max_steps > 0:
                parts = max(1, round(trainer.max_steps / 250))
                interval = -(-trainer.max_steps // parts)
                trainer.val_check_interval = interval * trainer.accumulate_grad_batches
            else:
                trainer.check_val_every_n_epoch = 1

    def after_instantiate_classes(self) -> None:
        """Compare the checkpoint with the model before anything is read into it."""
        config, fits = self.config[self.subcommand], self.subcommand == "fit"
        path, init = self._checkpoint(), config.model.get("init_args") or {}
        if path:
            check_checkpoint(self.model, path)
            steps = checkpoint.read(path)["global_step"]
            if fits and 0 < config.trainer.max_steps <= steps:
                log.warning(
                    f"nothing to do: {path} has made its {steps} steps; "
                    "raise --trainer.max_steps to go on"
                )
        elif not (config.get("ckpt_path") or fits or init.get("pretrained")):
            log.warning("these are fresh weights: --ckpt_path RUN scores a trained model")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the logger and callbacks that a run has by default."""
        config = self.config_init[self.subcommand].trainer
        if config.get("logger") in (None, True) and not config.fast_dev_run:
            run = self.run_folder
            runs = self._runs() if run is None else run.parent
            try:
                runs.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(
                    f"cannot write into {str(runs.parent)!r} ({error.strerror}): choose another "
                    "folder with --trainer.default_root_dir."
                ) from error
            kwargs["logger"] = RunLog(
                runs.parent, name=runs.name, version=run.name if run else None
            )
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], extra: list[Any]) -> Trainer:
        given = config.get("callbacks") or []
        given = list(given) if isinstance(given, list) else [given]
        if config.get("enable_checkpointing") is False or config.get("fast_dev_run"):
            extra = []
        extra += [*callbacks.recorders(), report.EvaluationReport()]
        if self.subcommand == "predict":
            self.predictions = tables.WritePredictions(self.config[self.subcommand].out)
            extra.append(self.predictions)
        if config.get("enable_progress_bar") is not False:
            extra.append(callbacks.ProgressBar())
        config["callbacks"] = given
        return super()._instantiate_trainer(config, extra)

    def before_fit(self) -> None:
        """Say how large the model is; let the ``config.yaml`` of a run that goes on begin it."""
        if self.run_folder is not None:
            self.config.fit.ckpt_path = None
        if self.trainer.is_global_zero:
            size = sum(p.numel() for p in self.model.parameters())
            sys.stdout.write(f"{type(self.model).__name__}: {size:,} parameters\n")

    def after_fit(self) -> None:
        """Say where everything is."""
        folder = callbacks.run_folder(self.trainer)
        if self.trainer.is_global_zero and (folder / "last.ckpt").is_file():
            data = type(self.datamodule).__name__
            hint = f"predict --ckpt_path {folder} --data {data}"
            if isinstance(self.model, lightning_modules.CausalLM):
                hint = CONTINUES.get(data, 'generate --ckpt {} --prompt "..."').format(folder)
            written = ", ".join(sorted(file.name for file in folder.iterdir()))
            sys.stdout.write(f"wrote {folder}: {written}\ntry  statezoo {hint}\n")

    def after_predict(self) -> None:
        """Say where the numbers are."""
        if self.trainer.is_global_zero and self.predictions.path:
            sys.stdout.write(f"wrote {self.predictions.path}\n")


def check_checkpoint(model: LightningModule, path: str) -> None:
    """Raise where a checkpoint does not fit a model.

    Raises:
        CheckpointError: If it holds another architecture or shape; says which.
    """
    content = checkpoint.read(path)
    has = checkpoint.class_path(content, path)
    wanted = f"{type(model).__module__}.{type(model).__qualname__}"
    if has != wanted:
        raise checkpoint.CheckpointError(
            f"{path!r} holds the architecture {has.rpartition('.')[2]}, not "
            f"{type(model).__name__}: leave --model out, and it is taken from the checkpoint."
        )
    symbols = content["hyper_parameters"].get("vocab_size")
    if symbols != model.hparams.get("vocab_size", symbols):
        raise checkpoint.CheckpointError(
            f"{path!r} has {symbols} symbols, the data {model.hparams['vocab_size']}: "
            f"--data.tokenizer {path} reads text as it was read then."
        )
    classes = content["hyper_parameters"].get("class_names")
    if classes != model.hparams.get("class_names", classes):
        raise checkpoint.CheckpointError(
            f"{path!r} tells the classes {classes} apart, the data has "
            f"{model.hparams['class_names']}: start a new run from the weights with "
            "--model.pretrained."
        )
    for key, value in content["hyper_parameters"].items():
        if key not in ("optim", "pretrained", "backend") and model.hparams.get(key, value) != value:
            raise checkpoint.CheckpointError(
                f"{path!r} has {key} {value!r}, the model {model.hparams[key]!r}: leave the "
                "setting out, or start a new run from the weights with --model.pretrained."
            )


def quiet() -> None:
    """Silence advertisements and warnings about things that are as they should be."""
    for message in (
        ".*does not have many workers.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*exists and is not empty.*",
        ".*`max_epochs` was not set.*",
        ".*You defined a `validation_step` but have no.*",
        ".*is smaller than the logging interval.*",
        ".*`tensorboardX` has been removed.*",
        "FSDP2-wrapped module .* returned a view tensor.*",  # states, which no one writes into
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )


def run(arguments: Sequence[str]) -> None:
    """Run fit, validate, test or predict.

    Raises:
        SystemExit: With code 2 after a mistake of the user, 1 where training broke down, 143 after
            the signal TERM.
    """
    quiet()
    program = f"statezoo {arguments[0]}"
    Parser.program = program
    debug = bool(os.environ.get("STATEZOO_DEBUG"))
    try:
        StateZooCLI(args_.prepare(arguments))
    except SIGTERMException:
        raise SystemExit(128 + signal.SIGTERM) from None
    except (FloatingPointError, checkpoint.RunStopped) as error:
        if debug:
            raise
        fail(program, str(error), code=1)
    except (ValueError, TypeError, OSError, ImportError, MisconfigurationException) as error:
        if debug:
            raise
        cause: BaseException = error
        while cause.__cause__ is not None and _raised_in(cause) == "jsonargparse":
            cause = cause.__cause__
        fail(
            program,
            " ".join(str(cause).split()) or type(cause).__name__,
            hint="STATEZOO_DEBUG=1 shows where",
        )


def _raised_in(error: BaseException) -> str:
    """Return the package whose code raised an error."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).partition(".")[0]


__all__ = ["StateZooCLI", "check_checkpoint", "datamodules", "lightning_modules", "run"]
