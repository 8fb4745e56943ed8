"""A cohort to a bundle: one readable loop. A resumed run follows the unbroken one; validation is production's own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from medmamba.bundle import Bundle, mirrored, worn
from medmamba.errors import ConfigError
from medmamba.files import hash_json
from medmamba.layers.onednn import one_dnn
from medmamba.ops.tripwire import NonFiniteError, tripwire
from pipelines.config import TrainRun
from pipelines.learning.change_run import Run
from pipelines.learning.checkpoint import INDEX, Progress, apart, load_checkpoint, save_checkpoint
from pipelines.learning.folds import conclude_folds, fold_lessons, fold_told
from pipelines.learning.learned import draft
from pipelines.learning.lessons import Lesson, lesson_of
from pipelines.learning.parallel import Processes, processes
from pipelines.learning.sampling import Batch, Sampler
from pipelines.learning.step_memory import settle_memory
from pipelines.networks import NETWORKS
from pipelines.serving.predict import Predictor, choose_device
from pipelines.tasks import build_task

CLIP_NORM = 1.0
# What may differ without changing the curve
FREE_ON_RESUME = {"device", "output", "card", "manifest", "dataset", "debug", "memory", "ram"}
Log = Callable[[dict[str, float], int], None]


class DivergedError(ConfigError):
    """A loss or a gradient is not finite."""


def train(
    run: Run, *, resume: bool = False, log: Log | None = None, progress: Callable[[int, int], None] | None = None
) -> Bundle:
    """Trains and writes `<output>/bundle` (the last weights), `validation/` (scores, and predictions before cleaning),
    `checkpoint/` (each epoch).

    Under torchrun the processes learn as one, each from its own `run.batch` patches a step; the first one writes.
    `log(figures, step)` once an epoch, `progress(done, all)` once a step. Raises ConfigError for a wrong run or cohort,
    DivergedError when the loss is not finite (naming step and cases); a checkpoint that exists is used with `resume`
    alone. With more than one fold each is such a training in `<output>/fold_<k>`, and the bundle holds them all.
    """
    with processes(choose_device(run.device)) as group:
        if not isinstance(run, TrainRun) or run.folds == 1:
            return _train(run, lesson_of(run), group, resume=resume, log=log, progress=progress)
        lessons = fold_lessons(run)
        for k, lesson in enumerate(lessons):
            told = fold_told(k, run, log, progress)
            _train(lesson.run, lesson, group, resume=resume, log=told[0], progress=told[1])
        if group.first:
            conclude_folds(run, lessons)
        group.wait()
        return Bundle.load(run.output / "bundle")


def _train(
    run: Run,
    lesson: Lesson,
    group: Processes,
    *,
    resume: bool,
    log: Log | None,
    progress: Callable[[int, int], None] | None,
) -> Bundle:
    checkpoint = run.output / "checkpoint"
    if (checkpoint / INDEX).exists() and not resume:
        raise ConfigError(f"{checkpoint}: a training was begun here; go on with --resume or choose another output")
    device, contract = group.part(choose_device(run.device)), run.preprocessing.contract()
    torch.manual_seed(run.seed)
    bare = build(run).to(device)
    settle_memory(bare, run, device)
    network = worn(bare, contract.windowing)
    optimizer = torch.optim.AdamW(network.parameters(), lr=run.lr, weight_decay=run.weight_decay)
    settings = fixed_settings(run, lesson, group.count)
    done = load_checkpoint(checkpoint, network, optimizer, settings) if resume else None
    done = done or Progress(epoch=0, history=(), settings=settings)
    predictor = Predictor(
        bundle=draft(run),
        network=mirrored(network, contract.mirror),
        task=build_task(run.task),
        device=device,
        batch=run.batch,  # what fits a step fits
    )
    sampler = Sampler(
        lesson.examples() if done.epoch < run.epochs else [],
        run.preprocessing.window,
        batch=run.batch,
        foreground_share=run.foreground_share,
        augment=run.augment,
        seed=run.seed,
        share=(group.rank, group.count),
        modality_dropout=contract.modality_dropout,
        vary=lesson.vary,
    )
    learner, scores = group.learner(network), None
    torch.manual_seed(run.seed + group.rank)
    for epoch in range(done.epoch, run.epochs):
        began, losses = time.perf_counter(), []
        network.train()
        for step, batch in batches(sampler, epoch * run.steps_per_epoch, (epoch + 1) * run.steps_per_epoch):
            for settled in optimizer.param_groups:
                settled["lr"] = learning_rate(run, step)
            losses.append(
                learn(learner, optimizer, lesson.criterion, batch, device, amp=run.amp, debug=run.debug, step=step)
            )
            if progress:
                progress(step + 1, run.steps)
        figures = {"loss": sum(losses) / len(losses), "lr": learning_rate(run, (epoch + 1) * run.steps_per_epoch - 1)}
        last = epoch + 1 == run.epochs
        if group.first and lesson.held and ((epoch + 1) % run.validate_every == 0 or last):
            scores = lesson.validate(predictor, last=last)
            figures |= lesson.figures(scores)
        record = {"epoch": epoch + 1, **figures, "losses": losses}
        done = Progress(epoch=epoch + 1, history=(*done.history, record), settings=settings)
        if group.first:
            save_checkpoint(checkpoint, network, optimizer, done)
        if log and group.first:
            log({**figures, "seconds": time.perf_counter() - began}, (epoch + 1) * run.steps_per_epoch)
    if group.first:
        closing = lesson.conclude(predictor, apart(bare.state_dict()), scores)
        if log and closing:
            log(closing, run.steps)
    group.wait()
    return Bundle.load(run.output / "bundle")


def learn(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    criterion: Callable[[Tensor, Tensor], Tensor],
    batch: Batch,
    device: torch.device,
    *,
    amp: bool,
    debug: bool,
    step: int,
) -> float:
    """One step; the loss before it. bfloat16 only on a GPU that has it; the loss is always float32.

    Raises DivergedError when loss or gradients are not finite, naming the cases, and with `debug` the layer.
    """
    half = amp and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    optimizer.zero_grad(set_to_none=True)
    told = f"step {step}, cases {', '.join(sorted(set(batch.cases)))}"
    image = batch.image.to(device)
    try:
        with tripwire(network) if debug else nullcontext(), one_dnn(image):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
                scores = network(image)
            loss = criterion(scores.float(), batch.labels.to(device))
            loss.backward()
    except NonFiniteError as error:
        raise DivergedError(f"{told}: {error}") from error
    norm = nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
    value = float(loss.detach())
    if not (math.isfinite(value) and bool(torch.isfinite(norm))):
        raise DivergedError(
            f"{told}: loss {value}, gradient norm {float(norm)}; look at these files, lower lr and resume, or set "
            "debug = true to learn which layer breaks first"
        )
    optimizer.step()
    return value


def batches(sampler: Sampler, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
    """Steps and their batches; the next one is drawn in a thread while the present one is learned from."""
    with ThreadPoolExecutor(1, thread_name_prefix="patches") as pool:
        coming = pool.submit(sampler.draw, start)
        for step in range(start, stop):
            batch = coming.result()
            if step + 1 < stop:
                coming = pool.submit(sampler.draw, step + 1)
            yield step, batch


def learning_rate(run: Run, step: int) -> float:
    """Linear warm-up, then half a cosine down to 0 at the end of the run."""
    if step < run.warmup_steps:
        return run.lr * (step + 1) / run.warmup_steps
    share = (step - run.warmup_steps) / max(1, run.steps - run.warmup_steps)
    return run.lr * 0.5 * (1 + math.cos(math.pi * share))


def build(run: Run) -> nn.Module:
    """The network of the run. Raises ConfigError for an unknown name, with the known ones."""
    if run.architecture not in NETWORKS:
        raise ConfigError(f"architecture {run.architecture!r} unknown; known: {', '.join(sorted(NETWORKS))}")
    return NETWORKS[run.architecture](run.network_config)


def fixed_settings(run: Run, lesson: Lesson, processes: int) -> dict[str, Any]:
    """What a resumed run must share with the one that was begun: settings, patches a step and the ids of the cases."""
    values = run.model_dump(mode="json", exclude=FREE_ON_RESUME)
    return {**values, "batch": run.batch * processes, "cases": hash_json([lesson.learned, lesson.held])}
