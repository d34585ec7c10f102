"""What other libraries call our options: for the hint of an error, never accepted as an option."""

import re
from collections.abc import Iterable

from tl_jax.core import messages
from tl_jax.core.options import OPTIONS

# Option, an example of its value, and what else it is called; all lower case with _.
_ROWS = (
    ("lr", "0.001", "learning_rate base_lr init_lr initial_lr lr0 max_lr peak_lr head_lr step_size"),
    ("total", "(10,'epochs')", "epochs epoch num_epochs n_epochs max_epochs num_train_epochs train_epochs"),
    ("total", "(1000,'steps')", "steps num_steps max_steps train_steps total_steps iterations max_iter iters"),
    ("batch_size", "32", "bs batch batchsize train_batch_size per_device_train_batch_size minibatch_size"),
    ("eval_batch_size", "128", "val_batch_size test_batch_size per_device_eval_batch_size"),
    ("weight_decay", "0.01", "wd weightdecay l2 l2_regularization"),
    ("optimizer", "adamw", "opt optim optimiser"),
    ("optimizer_args", "{'b2':0.99}", "betas beta1 beta2 b1 b2 eps epsilon adam_epsilon adam_beta1 adam_beta2"),
    ("optimizer_args", "{'momentum':0.9}", "momentum nesterov"),
    ("clip", "1.0", "grad_clip clip_grad clip_norm max_grad_norm gradient_clip_val gradient_clipping clipnorm"),
    ("accumulate", "4", "gradient_accumulation_steps grad_accum accum_steps accumulate_grad_batches accumulation"),
    ("schedule.name", "cosine", "scheduler lr_scheduler lr_schedule lr_scheduler_type sched schedule"),
    ("schedule.warmup", "(100,'steps')", "warmup_steps warmup_epochs warmup_ratio lr_warmup num_warmup_steps"),
    ("groups", "{'backbone':{'lr_mult':0.1}}", "backbone_lr backbone_lr_mult lr_mult lr_head encoder_lr param_groups"),
    ("layer_decay", "0.75", "llrd layerwise_lr_decay layer_lr_decay lr_layer_decay"),
    ("ema", "0.999", "ema_decay model_ema use_ema"),
    ("patience", "3", "early_stopping early_stopping_patience early_stop"),
    ("seed", "0", "random_seed random_state rng_seed manual_seed"),
    ("log_every", "(10,'steps')", "log_interval logging_steps print_freq log_every_n_steps"),
    ("eval_every", "(1,'epochs')", "eval_interval eval_steps save_steps val_check_interval eval_freq save_every"),
    ("select", "best_val", "load_best_model_at_end save_best monitor"),
    ("model.name", "resnet50", "backbone arch architecture model_name model_name_or_path network encoder net"),
    ("model.weights", "FILE", "pretrained checkpoint ckpt pretrained_weights checkpoint_path weights_path init_from"),
    ("model.image_size", "224", "img_size input_size resolution size crop_size imgsz"),
    ("model.channels", "1", "in_chans in_channels num_channels input_channels"),
    ("model.dropout", "0.1", "drop drop_rate dropout_rate head_dropout classifier_dropout"),
    ("model.hidden_dropout", "0.1", "hidden_dropout_prob attention_probs_dropout_prob attention_dropout resid_pdrop "
     "embd_pdrop attn_pdrop proj_drop attn_drop proj_drop_rate attn_drop_rate pos_drop_rate"),
    ("model.drop_path", "0.1", "drop_path_rate stochastic_depth stochastic_depth_rate"),
    ("model.dtype", "bfloat16", "precision amp fp16 bf16 mixed_precision half"),
    ("model.remat", "block", "gradient_checkpointing grad_checkpointing activation_checkpointing"),
    ("data.source", "folder:PATH", "dataset data_path data_root dataset_name dataset_path root train_dir images"),
    ("data.train", "train", "train_split training_split"),
    ("data.val", "val", "val_split validation validation_split valid valid_split eval_split"),
    ("data.test", "test", "test_split"),
    ("data.resample", "kfold:5:0", "cv folds k_fold kfold n_splits cross_validation"),
    ("data.shots", "5", "num_shots n_shots few_shot samples_per_class"),
    ("data.augment", "(('flip',{}),)", "augmentation augmentations transform transforms aug hflip horizontal_flip"),
    ("data.workers", "4", "num_workers dataloader_num_workers n_workers"),
    ("data.sampling", "class_balanced", "sampler balanced weighted_sampler shuffle"),
    ("task_args", "{'class_weight':'balanced'}", "class_weight class_weights pos_weight"),
    ("method.name", "linear_probe", "freeze freeze_backbone frozen freeze_encoder feature_extract head_only"),
    ("method.name", "full", "finetune fine_tune finetuning full_finetune trainable unfreeze_all"),
    ("method.name", "last_k --config.method.k=2", "unfreeze unfreeze_layers num_unfrozen unfrozen freeze_layers"),
    ("method.add", "(('lora',{'rank':4}),)", "peft lora lora_rank lora_r lora_alpha adapter adapters"),
    ("method.label_smoothing", "0.1", "smoothing label_smoothing_factor"),
    ("method.mixup", "0.2", "mixup_alpha mixup_prob"),
    ("method.cutmix", "1.0", "cutmix_alpha cutmix_prob"),
)  # fmt: skip
ELSEWHERE = {
    "num_classes n_classes nb_classes num_labels classes": "the labels of data.source say how many classes there are",
    "output_dir out_dir out save_dir logdir log_dir outdir checkpoint_dir": "it is the flag --workdir FOLDER here",
    "device devices gpu gpus cuda accelerator num_gpus": "every device that jax finds is used",
    "loss criterion loss_fn objective": "task says what is predicted, and terms what is added to its loss",
    "resume resume_from": "the same command with the same --workdir resumes",
}
_OPTIONS = {name: (option, example) for option, example, names in _ROWS for name in names.split()}
_TEXTS = {name: text for names, text in ELSEWHERE.items() for name in names.split()}
EXAMPLES = {option: example for option, example, _ in reversed(_ROWS)}  # the first of each


def hint(key: str, known: Iterable[str]) -> str:
    """What an unknown option is called here, with an example, or ` (did you mean 'x'?)`; "" where nothing is near."""
    text = re.sub(r"[^a-z0-9.]+", "_", key.lower())
    ends = {name.rpartition(".")[2]: name for name in OPTIONS if name.rpartition(".")[2] != "name"}
    for name in (text, text.rpartition(".")[2]):
        if name in _TEXTS:
            return f" ({_TEXTS[name]})"
        if name in _OPTIONS or name in ends:
            option, example = _OPTIONS.get(name) or (ends[name], EXAMPLES.get(ends[name], ""))
            return f" (it is {option} here{_shown(option, example)})"
    return messages.nearest(key, known)


def example(option: str) -> str:
    """`, such as --config.OPTION=VALUE`, which works in a shell; "" for an option that has none."""
    return _shown(option, EXAMPLES.get(option, ""))


def _shown(option: str, value: str) -> str:
    quoted = f'"{value}"' if re.search(r"[^\w.: =-]", value) else value
    return f", such as --config.{option}={quoted}" if value else ""
