"""`hybridvl fit|validate|test|predict`: Lightning's command line with our run folder, errors and defaults."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf.errors import OmegaConfBaseException

from hybridvl.cli.messages import explain, mistake_behind, with_path
from hybridvl.cli.mixer_flags import merge_mixer_flags
from hybridvl.cli.run_config import RunConfig
from hybridvl.cli.stages import net_of_source, stage_class, stage_name
from hybridvl.data.module import ChatDataModule
from hybridvl.layers.errors import ConfigError, RunError
from hybridvl.training.base import TrainingModule
from hybridvl.training.callbacks.checkpoints import BEST, LAST, Checkpoints
from hybridvl.training.callbacks.exact_resume import ExactResume
from hybridvl.training.callbacks.examples import ExampleImages
from hybridvl.training.callbacks.export import ExportModel
from hybridvl.training.callbacks.finite_loss import FiniteLoss
from hybridvl.training.callbacks.hparams import HParams
from hybridvl.training.callbacks.memory import MemoryMonitor
from hybridvl.training.callbacks.predictions import PredictionWriter
from hybridvl.training.callbacks.process_group import FIRST, ProcessGroup, follow_first_process, leave_process_group
from hybridvl.training.callbacks.progress import StepProgress
from hybridvl.training.callbacks.progress_file import ProgressFile
from hybridvl.training.callbacks.run_card import RunCard
from hybridvl.training.callbacks.run_summary import RunSummary
from hybridvl.training.callbacks.skipped import SkippedSamples
from hybridvl.training.callbacks.state_norms import StateNorms
from hybridvl.training.callbacks.throughput import Throughput
from hybridvl.training.checkpoints.files import AtomicCheckpointIO
from hybridvl.training.checkpoints.shards import is_sharded_checkpoint
from hybridvl.training.memory import is_out_of_memory, memory_message
from hybridvl.training.trainer import callback_of, is_dry_run, run_folder

DESCRIPTIONS = {
    "fit": "Train a model from a recipe, test it, and leave a run folder: hybridvl fit --config recipes/digits.yaml",
    "validate": "Teacher-forced accuracy of a checkpoint: hybridvl validate --config RUN/config.yaml --ckpt_path last",
    "test": "Score generated replies of a checkpoint: hybridvl test --config RUN/config.yaml --ckpt_path last",
    "predict": "Write replies to RUN/predictions.jsonl: hybridvl predict --config RUN/config.yaml --ckpt_path last",
}


# Environment variable in which the first process tells those that it starts the name of the run's folder.
_VERSION = "HYBRIDVL_RUN_VERSION"

# What the system answers when the run folder cannot be made where the recipe wants it.
_NO_FOLDER = (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG)


class _Parser(LightningArgumentParser):
    """A parser whose error output begins with the mistake."""

    # For messages, which nested parsers raise too: the command's own parser, the files given with --config, all flags.
    command: ClassVar[LightningArgumentParser | None] = None
    recipes: ClassVar[list[Path]] = []
    flags: ClassVar[list[str]] = []

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Print one explanation and exit with status 2."""
        print(f"error: {explain(message, self.command or self, self.recipes, self.flags)}", file=sys.stderr)
        self.exit(2)


class _SaveConfig(SaveConfigCallback):
    """Writes the resolved config.yaml of a fit; other commands leave a run's own file alone."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Wait: a checkpoint to go on from may yet be refused, and the run's file must then be as before."""

    def on_sanity_check_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Write it before the first validation of a fit."""
        super().setup(trainer, pl_module, "fit")

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Write it if there was no such validation."""
        super().setup(trainer, pl_module, "fit")


class TrainingCLI(LightningCLI):
    """Builds the trainer, the model and the data from a recipe and runs one command.

    Args:
        command: fit, validate, test or predict.
        arguments: what the user wrote after it.
    """

    def __init__(self, command: str, arguments: Sequence[str]) -> None:
        self._command = command
        _Parser.recipes = _config_files(arguments)
        _Parser.flags = [word[2:].partition("=")[0] for word in arguments if word.startswith("--")]
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        self._made: Path | None = None
        self._stage = stage_name(arguments, _Parser.recipes)
        found = net_of_source(arguments, _Parser.recipes) if self._stage == "supervised" else []
        try:
            super().__init__(
                stage_class(self._stage),
                ChatDataModule,
                save_config_callback=_SaveConfig,
                save_config_kwargs={"overwrite": True},
                seed_everything_default=0,
                trainer_defaults={"enable_model_summary": False},
                parser_kwargs={
                    "prog": "hybridvl",
                    "parser_mode": "omegaconf+",
                    command: {
                        "parser_mode": "omegaconf+",
                        "description": DESCRIPTIONS[command],
                        "usage": f"hybridvl {command} --config RECIPE [--KEY VALUE ...]",
                    },
                },
                parser_class=_Parser,
                args=[command, *found, *merge_mixer_flags(arguments, _Parser.recipes)],
                auto_configure_optimizers=False,
            )
        except ConfigError:
            self._forget_folder()
            raise
        except (MemoryError, RuntimeError, OSError) as error:
            if is_out_of_memory(error):
                raise RunError(memory_message(error, self._stage, self.config[command])) from error
            raise

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the command that runs: building the parser of one takes seconds."""
        return {self._command: LightningCLI.subcommands()[self._command] | {"verbose", "weights_only"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The run folder, and the callbacks that have settings."""
        parser.add_argument("--run", type=RunConfig, default=RunConfig())
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_lightning_class_args(ExampleImages, "examples")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what the user wrote."""
        _Parser.command = self._subcommand_parsers[self._command]
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        # Lightning would take the model's configuration from the checkpoint, silently in place of the recipe's. We
        # keep the recipe, and refuse a checkpoint of another model.
        section = self.config[self._command]
        path = section.get("ckpt_path")
        if path is None and self._command != "fit":
            raise ConfigError(f"ckpt_path: {self._command} needs a checkpoint: a file, 'last' or 'best'")
        if path is None:
            return
        by_name = {"last": LAST, "best": BEST}.get(path)
        found = Path(path) if by_name is None else self._newest(by_name)
        if not (found.is_file() or is_sharded_checkpoint(found)):
            what = "a folder; expected a checkpoint, like last.ckpt" if found.is_dir() else "no such file"
            raise ConfigError(f"ckpt_path: {path}: {what}")
        section.ckpt_path = str(found)
        folder = found.resolve().parent.parent
        if found.parent.name == "checkpoints" and (by_name or self._command != "fit"):
            # Go on in the run's own folder.
            section.run.root, section.run.name = str(folder.parent.parent), folder.parent.name
            section.run.version = folder.name

    def _newest(self, name: str) -> Path:
        """The checkpoint `name` beside the recipe when that is a run's config.yaml, else of the newest version."""
        run: RunConfig = RunConfig(**self.config[self._command].run.as_dict())
        own = [recipe.parent / "checkpoints" / name for recipe in _Parser.recipes]
        found = [path for path in own if path.exists()]
        if not found:
            pattern = f"{run.version or '*'}/checkpoints/{name}"
            found = sorted(run.folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns)
            if not found:
                raise ConfigError(f"ckpt_path: no {run.folder / pattern}; there is nothing to go on from")
        return found[-1]

    def before_instantiate_classes(self) -> None:
        """Refuse a stage given in another way, and a fit without an end, which Lightning would run for 1,000 epochs."""
        stage = self._get(self.config, "run").stage
        if stage != self._stage:
            raise ConfigError(f"run.stage: {stage!r} was found too late; expected it in a recipe or as --run.stage")
        settings = self._get(self.config, "trainer")
        ends = (settings.max_epochs, settings.max_time, None if settings.max_steps == -1 else settings.max_steps)
        if self._command == "fit" and not settings.fast_dev_run and all(end is None for end in ends):
            raise ConfigError("trainer.max_steps: not set; a fit needs max_steps, max_epochs or max_time")

    def instantiate_trainer(self) -> Trainer:  # type: ignore[override]  # LightningCLI passes nothing
        """The trainer with our logger, callbacks and atomic checkpoint files."""
        run: RunConfig = self._get(self.config_init, "run")
        if run.threads is not None:
            torch.set_num_threads(run.threads)
        settings = self._get(self.config_init, "trainer")
        logger = settings.get("logger")
        given: dict[str, Any] = {}
        if logger in (None, True):
            given["logger"] = TensorBoardLogger(run.root, run.name, self._version(run), default_hp_metric=False)
        plugins = settings.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        given["plugins"] = [*plugins, AtomicCheckpointIO()]
        # The saved recipe repeats the run: from the beginning, as a new version.
        section = self.config[self._command]
        section.ckpt_path = section.run.version = None
        bar = settings.get("enable_progress_bar")
        self.trainer_defaults["callbacks"] = self._callbacks(progress_bar=bar is not False, logged=logger is not False)
        try:
            trainer = super().instantiate_trainer(**given)
        except ValueError as error:
            raise mistake_behind(error) or ConfigError(f"trainer: {str(error).strip().splitlines()[0]}") from error
        self._share_version(trainer)
        return trainer

    def _version(self, run: RunConfig) -> str | None:
        """The name of the run's folder as far as it is decided; processes that the first one starts have its own."""
        return run.version or os.environ.get(_VERSION)

    def _share_version(self, trainer: Trainer) -> None:
        """Let the processes of one run agree on its folder."""
        if trainer.world_size == 1 or not isinstance(trainer.logger, TensorBoardLogger):
            return
        version = self._version(self._get(self.config_init, "run"))
        launcher = trainer.strategy.launcher
        if version is None and not isinstance(launcher, _SubprocessScriptLauncher):
            raise ConfigError("run.version: not set; processes that were started one by one need a common name")
        os.environ[_VERSION] = version or f"version_{trainer.logger.version}"

    def _callbacks(self, progress_bar: bool, logged: bool) -> list[Callback]:
        seed = self._get(self.config, "seed_everything")
        callbacks: list[Callback] = [ProcessGroup(), ExactResume(), FiniteLoss(), Throughput(), MemoryMonitor()]
        callbacks += [StateNorms(), PredictionWriter(), SkippedSamples()]
        if progress_bar:
            callbacks.append(StepProgress())
        if logged:
            run: RunConfig = self._get(self.config_init, "run")
            callbacks += [HParams(seed, run.labels, run.metrics), RunCard(seed, run.labels), ProgressFile()]
        return [*callbacks, ExportModel(), RunSummary()]

    def before_fit(self) -> None:
        """Say what is trained, and where."""
        self._make_folder()
        if not self.trainer.is_global_zero:
            return
        net = self.model.net
        trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
        frozen = "" if trainable == net.num_params else f", {trainable:,} of them trained"
        print(f"model        {net.pattern}, {net.num_params:,} parameters{frozen}")
        print(f"run folder   {run_folder(self.trainer)}", flush=True)

    def after_fit(self) -> None:
        """Test the final weights, then say where everything is."""
        if self._get(self.config_init, "run").test and not is_dry_run(self.trainer):
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        self._summary().finish(self.trainer)
        self._report()

    def before_validate(self) -> None:
        """Make the run folder."""
        self._make_folder()

    def before_test(self) -> None:
        """Make the run folder."""
        self._make_folder()

    def before_predict(self) -> None:
        """Make the run folder."""
        self._make_folder()

    def validate(self, model: TrainingModule, datamodule: ChatDataModule, ckpt_path: str) -> None:
        """Validate without Lightning's table of metrics; the report has them."""
        self.trainer.validate(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False)

    def test(self, model: TrainingModule, datamodule: ChatDataModule, ckpt_path: str) -> None:
        """Test without Lightning's table of metrics; the report has them."""
        self.trainer.test(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False)

    def after_validate(self) -> None:
        """Say where everything is."""
        self._report()

    def after_test(self) -> None:
        """Say where everything is."""
        self._report()

    def _make_folder(self) -> None:
        if is_dry_run(self.trainer) or not self.trainer.is_global_zero:
            return
        folder = run_folder(self.trainer)
        new = not os.path.isdir(folder)
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            if error.errno not in _NO_FOLDER:
                raise
            root = self._get(self.config_init, "run").root
            raise ConfigError(f"run.root: {root}: cannot make the run folder there ({error.strerror})") from error
        self._made = folder if new else None

    def _forget_folder(self) -> None:
        """Remove the folder that this fit has made when it is refused before its first step."""
        if self._made is not None and self._made.exists() and not self.trainer.global_step:
            shutil.rmtree(self._made)

    def _report(self) -> None:
        if self.trainer.is_global_zero and not is_dry_run(self.trainer):
            print("\n".join(self._summary().lines(self.trainer)))

    def _summary(self) -> RunSummary:
        summary = callback_of(self.trainer, RunSummary)
        assert summary is not None
        return summary


def main(argv: Sequence[str]) -> int:
    """Run `argv[0]`, one of fit, validate, test and predict."""
    for talkative in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own use of torch
    threading.excepthook = _report_in_thread
    follow_first_process()
    try:
        TrainingCLI(argv[0], argv[1:])
        leave_process_group()
    except SIGTERMException:  # Lightning's, which would be a success otherwise
        return 128 + signal.SIGTERM
    except OmegaConfBaseException as error:
        place = str(getattr(error, "full_key", "") or "").removeprefix(f"{argv[0]}.")
        reason = str(error).splitlines()[0].replace(f"'{argv[0]}.", "'")
        raise ConfigError(f"{place or 'recipe'}: {reason}") from error
    except MisconfigurationException as error:
        raise ConfigError(f"trainer: {str(error).strip().splitlines()[0]}") from error
    except ValueError as error:
        mistake = mistake_behind(error)
        if mistake is None:
            raise
        raise ConfigError(with_path(mistake)) from error
    finally:
        threading.excepthook = threading.__excepthook__
        os.environ.pop(_VERSION, None)
        os.environ.pop(FIRST, None)
    return 0


def _report_in_thread(failed: threading.ExceptHookArgs) -> None:
    """TensorBoard's writer thread hands a failed write on to the main thread, which reports it once."""
    if not isinstance(failed.exc_value, OSError):
        threading.__excepthook__(failed)


def _config_files(arguments: Sequence[str]) -> list[Path]:
    """The files named by -c, --config and --config=."""
    following = [value for flag, value in pairwise(arguments) if flag in ("-c", "--config")]
    joined = [value.partition("=")[2] for value in arguments if value.startswith("--config=")]
    return [Path(value) for value in following + joined]
