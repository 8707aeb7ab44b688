"""Answer names of settings that other training programs use with the names that they have here.

Sources: ``TrainingArguments`` of transformers (https://huggingface.co/docs/transformers/main_classes/trainer),
LLaMA-Factory (https://llamafactory.readthedocs.io/en/latest/advanced/arguments.html), axolotl
(https://docs.axolotl.ai/docs/config-reference.html), PEFT's ``LoraConfig``
(https://huggingface.co/docs/peft/package_reference/lora), Megatron-LM (megatron/training/arguments.py), torchtitan
(torchtitan/config/job_config.py), nanotron and LitGPT. Names that differ from ours only by the section or by spelling
are not listed: :mod:`~.spelling` finds them.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_ACCUMULATION = (
    "training.global_batch_size, the samples of a step over all ranks: training.micro_batch_size x data-parallel ranks "
    "x gradient_accumulation_steps"
)
_COMPUTE = "training.precision, which is bf16 by itself where the hardware has it"

TRANSFORMERS = {
    "output_dir": "run_folder",
    "num_train_epochs": "training.train_epochs",
    "max_steps": "training.train_steps",
    "per_device_train_batch_size": "training.micro_batch_size, the samples of a rank in one pass",
    "gradient_accumulation_steps": _ACCUMULATION,
    "per_device_eval_batch_size": "training.micro_batch_size, with which evaluations also run",
    "lr_scheduler_type": "optimizer.schedule",
    "lr_scheduler_kwargs": "optimizer.decay_steps, optimizer.decay_shape and optimizer.min_learning_rate_ratio",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_epsilon": "optimizer.eps",
    "max_grad_norm": "optimizer.clip_grad_norm",
    "optim": "optimizer.name",
    "bf16": _COMPUTE,
    "fp16": "training.precision",
    "tf32": "training.precision",
    "eval_steps": "training.eval_interval, in steps",
    "eval_strategy": "training.eval_interval, a number of steps or epoch; 0 evaluates only at the end",
    "eval_on_start": "training.eval_at_start",
    "save_steps": "checkpoint.save_interval, in steps",
    "save_strategy": "checkpoint.save_interval, a number of steps or epoch",
    "save_total_limit": "checkpoint.keep_last",
    "load_best_model_at_end": "checkpoint.export_best, which writes the checkpoint with the lowest loss to best_model",
    "logging_steps": "logging.log_interval, in steps",
    "report_to": "logging.trackers",
    "disable_tqdm": "logging.progress_bar",
    "resume_from_checkpoint": "resume",
    "ignore_data_skip": "resume, which always continues after the samples that were used",
    "hub_model_id": "checkpoint.push_to_hub",
    "hub_private_repo": "checkpoint.hub_private",
    "gradient_checkpointing": "parallel.recompute: full",
    "torch_compile": "training.compile",
    "torch_compile_backend": "training.compile",
    "fsdp": "parallel.shard, which is on by itself if there are several ranks",
    "fsdp_config": "parallel.shard, parallel.reshard_after_forward and parallel.cpu_offload",
    "deepspeed": "parallel.shard, which shards weights, gradients and optimizer states over all ranks (ZeRO 3)",
    "ddp_timeout": "parallel.timeout_seconds",
    "use_cpu": "device: cpu",
    "data_seed": "seed, which also decides the order of the data",
    "dataloader_prefetch_factor": "data.prefetch_steps",
    "dataloader_num_workers": "data.prefetch_steps; one thread of each rank reads the data",
    "neftune_noise_alpha": "training.neftune_alpha",
}
OF_SCHEDULES = {
    "num_warmup_steps": "training.warmup_steps",
    "num_decay_steps": "optimizer.decay_steps",
    "num_stable_steps": "optimizer.decay_steps: the steps between warm-up and decay are stable",
    "min_lr_ratio": "optimizer.min_learning_rate_ratio",
    "min_lr_rate": "optimizer.min_learning_rate_ratio",
}
"""Entries of ``lr_scheduler_kwargs`` in transformers."""
TRANSFORMERS_BEFORE_5 = {
    "evaluation_strategy": TRANSFORMERS["eval_strategy"],
    "logging_dir": "run_folder, which has the TensorBoard events",
    "overwrite_output_dir": "resume: none with an empty run_folder; nothing is overwritten",
    "per_gpu_train_batch_size": TRANSFORMERS["per_device_train_batch_size"],
    "no_cuda": "device: cpu",
    "half_precision_backend": "training.precision",
}
LORA = {
    **dict.fromkeys(("r", "lora_r", "lora_rank"), "adapter.rank"),
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    **dict.fromkeys(("target_modules", "lora_target", "lora_target_modules", "lora_target_linear"), "adapter.targets"),
    **dict.fromkeys(("use_rslora", "peft_use_rslora"), "adapter.rslora"),
    **dict.fromkeys(("use_dora", "peft_use_dora"), "adapter.dora"),
    **dict.fromkeys(("finetuning_type", "use_lora", "peft_type"), "adapter.kind"),
    **dict.fromkeys(("load_in_4bit", "quantization_bit", "bnb_4bit_quant_type"), "adapter.quantize_base"),
    "load_in_8bit": "adapter.quantize_base: int8",
    **dict.fromkeys(("adapter_name_or_path", "lora_model_dir"), "adapter.initialize_from"),
    **dict.fromkeys(("additional_target", "lora_modules_to_save"), "adapter.modules_to_save"),
}
LLAMA_FACTORY = {
    **dict.fromkeys(("model_name_or_path", "model_name", "base_model"), "model.initialize_from"),
    **dict.fromkeys(("cutoff_len", "max_seq_length", "max_seq_len", "block_size"), "training.sequence_length"),
    **dict.fromkeys(("dataset", "datasets", "train_file", "dataset_name"), "data.train, a list of {path: ...}"),
    "val_size": "data.validation_fraction",
    "eval_dataset": "data.validation",
    "flash_attn": "training.attention_backend",
    "neat_packing": "data.attend_across_documents, which is false: packed documents do not see each other",
    "mix_strategy": "data.train[].weight",
    "interleave_probs": "data.train[].weight",
    "max_samples": "data.train[].max_tokens",
    "freeze_trainable_layers": "training.trainable",
    "use_badam": "optimizer.name",
    "moe_aux_loss_coef": "training.router_aux_loss_coef",
    "use_unsloth": "training.compile",
    "rope_scaling": "model.rope",
    "preprocessing_num_workers": "data.train[].preprocess: {workers: N}",
}
AXOLOTL = {
    "num_epochs": "training.train_epochs",
    "sequence_len": "training.sequence_length",
    "sample_packing": "data.packing; sequences are always packed",
    "val_set_size": "data.validation_fraction",
    "test_datasets": "data.validation",
    "lr_scheduler": "optimizer.schedule",
    "cosine_min_lr_ratio": "optimizer.min_learning_rate_ratio",
    "batch_size": "training.global_batch_size, the samples of a step over all ranks",
    "eval_batch_size": TRANSFORMERS["per_device_eval_batch_size"],
    "saves_per_epoch": "checkpoint.save_interval, in steps, or epoch for one",
    "evals_per_epoch": "training.eval_interval, in steps, or epoch for one",
    "early_stopping_patience": "training.early_stopping: {patience: N}",
    "flash_attention": "training.attention_backend",
    "sdp_attention": "training.attention_backend: sdpa",
    "context_parallel_size": "parallel.context",
    "tensor_parallel_size": "parallel.tensor",
    "dp_shard_size": "parallel.shard",
    "dp_replicate_size": "parallel.replicate",
    "wandb_project": "logging.project",
    "wandb_name": "logging.run_name",
    "unfrozen_parameters": "training.trainable",
    "dataset_prepared_path": "data.cache_folder",
    "auto_resume_from_checkpoints": "resume",
}
MEGATRON = {
    "train_iters": "training.train_steps",
    "train_samples": "training.train_tokens: samples x training.sequence_length",
    "lr_decay_style": "optimizer.schedule",
    "lr_decay_iters": "training.train_steps: the decay ends with the run",
    "lr_warmup_iters": "training.warmup_steps",
    "lr_warmup_fraction": "training.warmup_ratio",
    "lr_warmup_samples": "training.warmup_tokens: samples x training.sequence_length",
    "lr_wsd_decay_style": "optimizer.decay_shape",
    "lr_wsd_decay_iters": "optimizer.decay_steps",
    "lr_wsd_decay_samples": "optimizer.decay_tokens: samples x training.sequence_length",
    "clip_grad": "optimizer.clip_grad_norm",
    "eval_iters": "training.eval_tokens",
    "save": "run_folder",
    "load": "resume, or model.initialize_from to start from weights",
    "finetune": "model.initialize_from, which starts with new optimizer states",
    "data_path": "data.train, a list of {path: ..., weight: ...}",
    "valid_data_path": "data.validation",
    "split": "data.validation_fraction",
    "tokenizer_model": "model.tokenizer",
    "num_workers": "data.prefetch_steps; one thread of each rank reads the data",
    "exit_duration_in_mins": "training.stop_after_minutes",
    "tensor_model_parallel_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "num_layers_per_virtual_pipeline_stage": "parallel.pipeline_stages_per_rank",
    "num_virtual_stages_per_pipeline_rank": "parallel.pipeline_stages_per_rank",
    "moe_aux_loss_coeff": "training.router_aux_loss_coef; the same strength is it x layers / experts of a token",
    "moe_z_loss_coeff": "training.router_z_loss_coef; the same strength is it x layers",
    "moe_router_bias_update_rate": "training.router_bias_update_rate",
    "rotary_base": "model.rope: {kind: default, theta: N, factor: M}",
    "recompute_granularity": "parallel.recompute",
    "recompute_activations": "parallel.recompute: selective",
    "recompute_method": "parallel.recompute and parallel.recompute_every",
    "use_distributed_optimizer": "parallel.shard, which also shards the optimizer states",
    "use_flash_attn": "training.attention_backend",
    "reset_attention_mask": "data.attend_across_documents: false",
    "reset_position_ids": "data.attend_across_documents: false",
    "eod_mask_loss": "data.attend_across_documents: false",
    "fp8_format": "training.float8",
    "distributed_timeout_minutes": "parallel.timeout_seconds",
    "tensorboard_dir": "logging.tensorboard; the events are in run_folder",
    "rampup_batch_size": "training.global_batch_size, which is constant",
}
TORCHTITAN = {
    "dump_folder": "run_folder",
    "steps": "training.train_steps",
    "local_batch_size": TRANSFORMERS["per_device_train_batch_size"],
    "max_norm": "optimizer.clip_grad_norm",
    "decay_type": "optimizer.decay_shape",
    "min_lr_factor": "optimizer.min_learning_rate_ratio",
    "data_parallel_shard_degree": "parallel.shard",
    "data_parallel_replicate_degree": "parallel.replicate",
    "tensor_parallel_degree": "parallel.tensor",
    "pipeline_parallel_degree": "parallel.pipeline",
    "context_parallel_degree": "parallel.context",
    "enable_cpu_offload": "parallel.cpu_offload",
    "log_freq": "logging.log_interval, in steps",
    "keep_latest_k": "checkpoint.keep_last",
    "initial_load_path": "model.initialize_from",
    "last_save_in_hf": "checkpoint.export_hf",
    "gc_freq": "training.gc_interval",
    "init_timeout_seconds": "parallel.timeout_seconds",
    "train_timeout_seconds": "parallel.timeout_seconds",
    "activation_checkpoint": "parallel.recompute",
    "rope_theta": "model.rope: {kind: default, theta: N, factor: M}",
    "load_balance_coeff": "training.router_bias_update_rate",
}
NAMES = {
    **TORCHTITAN,
    **MEGATRON,
    **AXOLOTL,
    **LLAMA_FACTORY,
    **LORA,
    **OF_SCHEDULES,
    **TRANSFORMERS_BEFORE_5,
    **TRANSFORMERS,
}
"""What to use instead of a name of another program."""
_KEY = re.compile(r"\b(?:model|data|training|adapter|optimizer|parallel|checkpoint|logging)\.[a-z_.]+[a-z][0-9]?")


def used_instead(key: str, known: Collection[str]) -> str | None:
    """Return what to use instead of the unknown ``key``, such as ``training.num_train_epochs``; None if nothing fits.

    Args:
        key: dotted, with - or _.
        known: all keys.
    """
    hint = NAMES.get(key.rpartition(".")[2].replace("-", "_").lower())
    if hint is None or not keys_in(hint) <= {*known}:
        return None
    return hint


def keys_in(hint: str) -> set[str]:
    """Return the dotted keys that ``hint`` names; of an entry of a list, the key of the list."""
    return set(_KEY.findall(hint))
