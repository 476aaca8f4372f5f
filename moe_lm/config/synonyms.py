"""What other programs call a setting: Hugging Face, TRL, peft, axolotl, litgpt, nanoGPT, torchtitan and Megatron.

Names are in lower case with underscores. One with a dot is meant only under that section: `optimizer.type`.
"""

from __future__ import annotations

# Our key, with the value that says the same where the name alone says it, and the names that others have for it.
# A name under several keys is all of them, or the one that the config has.
NAMES: dict[str, str] = {
    "run_dir": "output_dir out_dir save_dir checkpoint_dir save_folder dump_folder log_dir",
    "start_from": "base_model model_name_or_path pretrained_model_name_or_path model_name model_id init_from load "
    "initial_checkpoint_dir initial_load_path checkpoint_path pretrained_checkpoint",
    "model": "model_config model_args architecture transformer",
    "model.vocab_size": "n_vocab padded_vocab_size",
    "model.hidden_size": "d_model n_embd embed_dim emb_dim model_dim embedding_size dim hidden_dim",
    "model.num_hidden_layers": "n_layer n_layers num_layers depth",
    "model.num_attention_heads": "n_head n_heads num_heads num_query_heads",
    "model.num_key_value_heads": "n_kv_head n_kv_heads num_kv_heads num_query_groups n_query_groups",
    "model.head_dim": "head_size kv_channels d_head",
    "model.intermediate_size": "ffn_dim d_ff ffn_hidden_size n_inner inter_dim hidden_dim",
    "model.max_position_embeddings": "block_size n_ctx n_positions context_length ctx_len max_seq_len",
    "model.moe_intermediate_size": "moe_ffn_hidden_size moe_inter_dim moe_hidden_dim expert_dim",
    "model.n_routed_experts": "num_local_experts num_experts n_experts n_expert num_routed_experts moe_num_experts "
    "experts",
    "model.num_experts_per_tok": "top_k topk moe_top_k moe_topk moe_k moe_router_topk n_activated_experts "
    "n_expert_per_token num_experts_per_token experts_per_token num_selected_experts",
    "model.n_shared_experts": "num_shared_experts moe_num_shared_experts shared_experts n_shared_expert",
    "model.shared_expert_intermediate_size": "moe_shared_expert_intermediate_size shared_intermediate_size",
    "model.first_k_dense_replace": "n_dense_layers num_dense_layers first_k_dense moe_layer_start_index",
    "model.mlp_only_layers": "dense_layers decoder_sparse_step",
    "model.scoring_func": "score_func score_function router_type moe_router_score_function moe_router_activation_func",
    "model.norm_topk_prob": "norm_topk normalize_topk route_norm moe_renormalize",
    "model.routed_scaling_factor": "route_scale moe_router_topk_scaling_factor",
    "model.n_group": "n_groups num_groups n_expert_groups moe_router_num_groups",
    "model.topk_group": "n_limited_groups topk_groups moe_router_group_topk",
    "model.capacity_factor": "moe_expert_capacity_factor expert_capacity_factor moe_capacity_factor",
    "model.norm_type": "normalization norm norm_class norm_class_name",
    "model.rms_norm_eps": "norm_eps rms_eps layer_norm_eps layer_norm_epsilon layernorm_epsilon",
    "model.hidden_act": "activation activation_function act_fn hidden_activation",
    "model.mlp_gated": "swiglu gated_mlp gated_linear_unit",
    "model.position_embedding": "position_embedding_type pos_emb positional_encoding use_rope rope",
    "model.rope_theta": "rotary_base rope_base rope_freq_base",
    "model.rope_scaling.factor": "rope_scaling_factor scaling_factor rope_factor",
    "model.use_qk_norm": "qk_norm qk_layernorm qk_layer_norm",
    "model.attention_bias": "bias qkv_bias add_qkv_bias use_bias",
    "model.mlp_bias": "bias use_bias",
    "model.tie_word_embeddings": "tie_embeddings tied_embeddings weight_tying share_embeddings_and_output_weights "
    "untie_embeddings_and_output_weights",
    "model.initializer_range": "init_std init_method_std",
    "data": "dataset_config data_args data_module",
    "data.sources": "datasets data_path data_paths data_files dataset_path dataset_name train_file train_files "
    "train_data train_dataset corpus",
    "data.train": "datasets data_path data_paths data_files dataset_path dataset_name train_file train_files "
    "train_data train_dataset",
    "data.validation": "val_file validation_file eval_file test_file val_data eval_data eval_dataset",
    "data.validation_fraction": "val_ratio val_size test_size val_set_size val_split_fraction validation_split "
    "eval_fraction",
    "data.tokenizer": "tokenizer_name tokenizer_path tokenizer_model tokenizer_dir tokenizer_name_or_path",
    "data.shards": "cache_dir dataset_prepared_path data_cache_path tokenized_path data_dir",
    "data.sequence_length": "max_length max_seq_length max_seq_len sequence_len seq_length seq_len cutoff_len "
    "block_size context_length ctx_len",
    "data.workers": "num_workers num_proc dataset_num_proc preprocessing_num_workers dataloader_num_workers",
    "data.sources.weight": "mixture_weights sampling_weights interleave_probs probs data_weights",
    "data.train.weight": "mixture_weights sampling_weights interleave_probs probs data_weights",
    "data.sources.text_field": "text_column text_key content_field content_key",
    "data.train.format": "chat_format dataset_format",
    "data.train.prompt_template": "prompt_style",
    "data.train.system": "system_prompt default_system",
    "train": "training trainer train_args training_args",
    "train.steps": "max_steps max_iters num_steps n_steps train_steps total_steps train_iters num_iterations "
    "num_train_steps max_train_steps training_steps iters",
    "train.tokens": "max_tokens total_tokens train_tokens num_tokens token_budget",
    "train.epochs": "num_epochs num_train_epochs n_epochs max_epochs epoch",
    "train.hours": "max_time max_hours time_limit exit_duration_in_mins",
    "train.global_batch_size": "batch_size total_batch_size train_batch_size effective_batch_size global_batch",
    "train.micro_batch_size": "per_device_train_batch_size per_device_batch_size device_batch_size local_batch_size "
    "train_micro_batch_size_per_gpu micro_batch microbatch_size",
    "train.seed": "random_seed manual_seed data_seed",
    "train.optimizer": "optim_args",
    "train.optimizer.name": "optim optimizer_type optimizer_name optimizer.type optimizer.class_path",
    "train.optimizer.lr": "learning_rate max_lr peak_lr base_lr adam_lr",
    "train.optimizer.betas": "beta1 beta2 adam_beta1 adam_beta2",
    "train.optimizer.eps": "adam_eps adam_epsilon epsilon",
    "train.optimizer.weight_decay": "wd",
    "train.optimizer.muon_lr": "matrix_lr muon_learning_rate",
    "train.optimizer.muon_momentum": "momentum",
    "train.schedule": "lr_scheduler lr_schedule scheduler",
    "train.schedule.name": "lr_scheduler_type lr_decay_style scheduler_type lr_scheduler.type scheduler.type",
    "train.schedule.warmup_steps": "warmup warmup_iters num_warmup_steps lr_warmup_iters lr_warmup_steps",
    "train.schedule.decay_fraction": "decay_ratio warmdown_ratio cooldown_fraction lr_wsd_decay_iters",
    "train.schedule.min_ratio": "min_lr_ratio min_lr_rate",
    "train.clip_norm": "max_grad_norm grad_clip clip_grad clip_grad_norm grad_clip_norm gradient_clip "
    "gradient_clipping gradient_clip_val max_norm",
    "train.precision": "dtype torch_dtype mixed_precision param_dtype params_dtype mixed_precision_param amp",
    "train.precision=bfloat16": "bf16 use_bf16",
    "train.compile": "torch_compile use_compile",
    "train.activation_checkpointing": "gradient_checkpointing activation_checkpoint recompute recompute_granularity "
    "recompute_activations activation_recompute ac_mode",
    "train.eval_every": "eval_steps eval_interval eval_freq eval_strategy evaluation_strategy val_check_interval "
    "validation_interval",
    "train.eval_batches": "eval_iters val_batches max_eval_batches eval_iterations",
    "train.early_stopping": "patience early_stopping_patience",
    "train.balance.batch_loss": "router_aux_loss_coef aux_loss_coef aux_loss_weight moe_aux_loss_coeff moe_loss_weight "
    "load_balance_loss_weight lb_loss_weight router_aux_loss",
    "train.balance.sequence_loss": "aux_loss_alpha seq_aux",
    "train.balance.z_loss": "router_z_loss router_z_loss_coef z_loss_coef z_loss_weight moe_z_loss_coeff",
    "train.balance.bias_update_rate": "bias_update_speed expert_bias_update_rate moe_router_bias_update_rate "
    "load_balance_coeff",
    "parallel": "parallelism distributed",
    "parallel.device": "accelerator device_type",
    "parallel.engine": "strategy distributed_backend backend",
    "parallel.attention_kernel": "attn_implementation attention_backend flash_attention use_flash_attn "
    "use_flash_attention flash_attn sdp_attention",
    "parallel.expert_parallel_size": "ep ep_size expert_parallel expert_parallel_degree expert_model_parallel_size "
    "moe_expert_parallel_size",
    "parallel.sequence_parallel_size": "cp cp_size sp sp_size context_parallel context_parallel_size "
    "context_parallel_degree sequence_parallel sequence_parallel_degree ulysses ulysses_size ulysses_degree",
    "parallel.zero_stage": "zero zero_optimization zero.stage zero_optimization.stage use_distributed_optimizer",
    "parallel.offload_optimizer": "cpu_offload offload offload_optimizer_device optimizer_offload",
    "parallel.timeout_seconds": "ddp_timeout nccl_timeout timeout",
    "checkpoint": "checkpointing",
    "checkpoint.every": "save_steps save_interval save_every save_strategy save_freq checkpointing_steps "
    "checkpoint_interval checkpoint_every ckpt_interval checkpoint.interval checkpoint.steps",
    "checkpoint.keep": "save_total_limit keep_latest_k keep_last keep_last_n max_checkpoints",
    "checkpoint.best": "load_best_model_at_end save_best keep_best",
    "checkpoint.background": "async_save async_mode async_checkpoint",
    "checkpoint.export=hf": "export_hf save_hf last_save_in_hf",
    "log": "logging",
    "log.every": "logging_steps log_interval log_freq log_every log_every_n_steps print_every",
    "log.trackers": "report_to log_with logger loggers tracker",
    "log.trackers=[wandb]": "wandb use_wandb wandb_log enable_wandb",
    "log.trackers=[tensorboard]": "tensorboard use_tensorboard enable_tensorboard",
    "log.project": "wandb_project project_name wandb.project",
    "log.eval_tasks": "tasks",
    "log.sample_prompts": "eval_prompts",
    "lora": "peft peft_config lora_config adapter",
    "lora.rank": "r lora_r lora_rank lora_dim adapter_rank",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.targets": "target_modules lora_target_modules lora_target lora_targets",
    "preference": "dpo dpo_config",
    "preference.beta": "dpo_beta",
    "preference.sft_weight": "rpo_alpha",
    "preference.label_smoothing": "dpo_label_smoothing",
}

# What has no key, or another meaning, and what to do.
ADVICE: dict[str, str] = {
    "gradient_accumulation_steps grad_accum gradient_accumulation grad_acc_steps": "it follows from others: "
    "train.global_batch_size over train.micro_batch_size times the processes",
    "warmup_ratio warmup_fraction lr_warmup_fraction": "there is no share for the warm-up; "
    "train.schedule.warmup_steps counts steps",
    "min_lr final_lr end_lr lr_min": "the last rate is a share of the first: set train.schedule.min_ratio",
    "lr_decay_iters lr_decay_steps": "the rate falls until the last of train.steps",
    "fp16 use_fp16 half": "there is no float16; set train.precision=bfloat16",
    "fp8 load_in_8bit load_in_4bit quantization quantize": "weights are not quantised here; "
    "train.precision=bfloat16 halves products, parallel.zero_stage=3 divides memory",
    "dropout attention_dropout hidden_dropout attn_dropout resid_dropout attn_pdrop resid_pdrop embd_pdrop": "models "
    "have no dropout; only adapters do, in lora.dropout",
    "resume resume_from_checkpoint resume_from auto_resume": "a run resumes by itself: run the same command again",
    "overwrite_output_dir overwrite": "nothing is overwritten; choose another run_dir",
    "shuffle": "rows are always shuffled, by train.seed",
    "packing sample_packing": "rows are always packed, without attention across documents",
    "chat_template template": "the template is the tokenizer's, in its chat_template.jinja",
    "trust_remote_code": "code of a model's folder is never run",
    "tp tp_size tensor_parallel tensor_parallel_size tensor_parallel_degree tensor_model_parallel_size": "there is no "
    "tensor parallelism; parallel.expert_parallel_size divides the experts, parallel.zero_stage everything",
    "pp pp_size pipeline_parallel pipeline_parallel_size pipeline_parallel_degree": "there "
    "is no pipeline parallelism; parallel.expert_parallel_size divides the experts, parallel.zero_stage everything",
    "dp dp_size ddp data_parallel data_parallel_size data_parallel_replicate_degree world_size num_processes "
    "nproc_per_node": "the processes are those that are started: moe-lm pretrain CONFIG --gpus all, or "
    "launch/torchrun.sh on several machines",
    "gpus n_gpus num_gpus devices n_gpus_per_node": "the number of GPUs is no setting: moe-lm pretrain CONFIG "
    "--gpus all",
    "nnodes num_nodes nodes": "the number of machines is the launcher's: launch/torchrun.sh, launch/slurm.sbatch",
    "fsdp fsdp_config fully_shard sharding_strategy dp_shard data_parallel_shard_degree": "ZeRO divides weights, "
    "gradients and moments: set parallel.engine=deepspeed and parallel.zero_stage=3",
    "deepspeed deepspeed_config": "set parallel.engine=deepspeed; DeepSpeed's JSON is made from parallel",
    "layer_types": "all layers attend to everything; dense ones are named in model.mlp_only_layers",
    "sliding_window": "all layers attend to everything",
    "num_nextn_predict_layers mtp_num_layers num_mtp_layers": "there is no multi-token prediction",
    "run_name experiment_name exp_name wandb_run_name wandb_name": "a run is called as its folder is: run_dir",
    "push_to_hub hub_model_id": "the hub is asked when a run is exported: moe-lm export RUN OUT --push NAME",
    "make_vocab_size_divisible_by": "set model.vocab_size to the padded size",
    "multiple_of ffn_dim_multiplier": "set model.intermediate_size itself",
}
