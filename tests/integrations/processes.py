"""One of several processes: trains what it is told with TRL and with the drop-in, and writes logs
and weights. Started by test_trl_processes.py through torch.distributed.run."""

import json
import logging
import os
import sys
from pathlib import Path

import torch
from trl_training import answer, trainer_of

from grpo_fast.integrations.trl_callback import RunLogCallback
from grpo_fast.token_log import read_token_step, read_token_steps

RANK = int(os.environ["RANK"])


def dead_on_the_second(completion_ids, **columns):
    """The groups of rank 1 have no difference to learn from."""
    return [1.0] * len(completion_ids) if RANK == 1 else answer(completion_ids)


def with_images(trainer):
    """Every second micro-batch of rank 0 alone has an image, which a text model reads no pixel
    of."""
    prepare = trainer._prepare_inputs

    def prepared(batch):
        prepare(batch)
        batches = trainer._buffered_inputs
        for k, inputs in enumerate(batches):
            if RANK == 0 and k % 2 and "num_images" not in inputs:
                size = len(inputs["prompt_ids"])
                images = {"pixel_values": torch.zeros(size, 3), "num_images": [1] * size}
                batches[k] = inputs | images
        return batches[trainer._step % len(batches)]

    trainer._prepare_inputs = prepared


def trained(kind, folder, options):
    from peft import LoraConfig

    options = dict(options)
    adapters, images = options.pop("adapters", False), options.pop("images", False)
    logged = options.pop("logged", False)
    function = dead_on_the_second if options.pop("dead", False) else answer
    kind.depth = options.pop("depth", "packed")
    options = {"ddp_timeout": 60, "per_device_train_batch_size": 4, **options}
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    # The timeout is the seconds that a rank waits for one that never comes.
    trainer = trainer_of(
        kind, folder, reward=function, peft_config=lora if adapters else None, **options
    )
    if images:
        with_images(trainer)
    if logged:
        trainer.add_callback(RunLogCallback(folder / "run", trainer, existing="move"))
    trainer.train()
    return trainer


def result(kind, folder, options, lines):
    lines.clear()
    trainer = trained(kind, folder, options)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    run = folder / "run"
    kept = [read_token_step(run, step).meta for step in read_token_steps(run)]
    return {
        "kept": kept if options.get("logged") and RANK == 0 else [],
        "log": trainer.state.log_history,
        "weights": {name: x.detach().clone() for name, x in weights.items()},
        "wrapped": type(trainer.model_wrapped).__name__,
        "lines": list(lines),
    }


def means():
    """`.grad` after averaging: of both ranks, of rank 0 alone, of nobody, frozen, in bfloat16 and
    larger than a bucket."""
    from grpo_fast.integrations import gradients

    gradients.BUCKET_BYTES = 16
    parameters = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(6)]
    parameters[4] = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    parameters[5] = torch.nn.Parameter(torch.zeros(9))
    parameters[3].requires_grad_(False)
    for k in (0, 1, 4, 5):
        if RANK == 0 or k != 1:
            parameters[k].grad = torch.full_like(parameters[k], 1.0 + k + 2 * RANK)
    gradients.average_gradients(parameters)
    return [x.grad for x in parameters]


class Lines(logging.Handler):
    def __init__(self, lines):
        super().__init__()
        self.lines = lines

    def emit(self, record):
        self.lines.append(record.getMessage())


def sharded_on_cpus() -> None:
    """Accelerate shards for every device but a CPU, although FSDP2 and gloo do: it is told of
    GPUs, and goes on with the devices that it has."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    begin = PartialState.__init__

    def told_of_gpus(state, *arguments, **options):
        begin(state, *arguments, **options)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = told_of_gpus


def main(folder: Path, out: Path, runs: list[dict]) -> None:
    from trl import GRPOTrainer

    from grpo_fast.integrations import trl

    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        sharded_on_cpus()
    lines: list[str] = []
    logger = logging.getLogger("grpo_fast")
    logger.setLevel(logging.INFO)
    logger.addHandler(Lines(lines))
    kinds = (GRPOTrainer, trl.GRPOTrainer)
    found = [[result(kind, folder, options, lines) for kind in kinds] for options in runs]
    torch.save((found, means()), out / f"{RANK}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
