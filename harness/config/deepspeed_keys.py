"""The keys of DeepSpeed's JSON, so that a typo is known before DeepSpeed is imported.

DeepSpeed ignores unknown keys at the top level and in some of its tables. The lists are those of
DeepSpeed 0.19.8; a test compares them with the DeepSpeed that is installed.
"""

from typing import TypeAlias

Table: TypeAlias = "dict[str, str | Table | None]"
"""What each key holds: a kind of value, a table, or, if None, a table with any keys. The kinds are
"flag", "number", "other", and "auto": something else or "auto"."""


def _table(
    flags: str = "",
    numbers: str = "",
    others: str = "",
    autos: str = "",
    any_keys: str = "",
    **tables: Table,
) -> Table:
    kinds = {"flag": flags, "number": numbers, "other": others, "auto": autos, None: any_keys}
    return dict(tables) | {key: kind for kind, keys in kinds.items() for key in keys.split()}


_BF16 = _table(
    flags="enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads "
    "bf16_optimizer_states"
)

_FP16 = _table(
    flags="enabled auto_cast consecutive_hysteresis fp16_master_weights_and_grads",
    numbers="loss_scale initial_scale_power loss_scale_window hysteresis min_loss_scale",
)

_ZERO = _table(
    flags="contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce "
    "allgather_partitions overlap_comm compute_grad_norm load_from_fp32_weights elastic_checkpoint "
    "cpu_offload_param cpu_offload_use_pin_memory cpu_offload gather_16bit_weights_on_model_save "
    "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save "
    "use_all_reduce_for_fetch_params stage3_use_all_reduce_for_fetch_params "
    "allgather_sequential stage3_allgather_sequential ignore_unused_parameters legacy_stage1 "
    "round_robin_gradients parameter_alignment zero_quantized_weights "
    "zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear "
    "pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings "
    "enable_sanity_checks save_muon_momentum_buffer_in_memory",
    numbers="stage reduce_bucket_size allgather_bucket_size sub_group_size "
    "prefetch_bucket_size stage3_prefetch_bucket_size "
    "param_persistence_threshold stage3_param_persistence_threshold "
    "model_persistence_threshold stage3_model_persistence_threshold "
    "max_live_parameters stage3_max_live_parameters max_reuse_distance stage3_max_reuse_distance "
    "module_granularity_threshold stage3_module_granularity_threshold zero_hpz_partition_size",
    offload_param=_table(
        flags="pin_memory",
        numbers="buffer_count buffer_size max_in_cpu",
        others="device nvme_path",
    ),
    offload_optimizer=_table(
        flags="pin_memory pipeline_read pipeline_write fast_init super_offload",
        numbers="buffer_count ratio cpuadam_cores_perc",
        others="device nvme_path",
    ),
    zenflow=_table(
        flags="overlap_step offload",
        numbers="topk_ratio auto_ratio full_warm_up_rounds pt_reserved_cores_perc steps_per_epoch",
        autos="select_strategy select_interval update_interval",
    ),
    leaf_module=_table(others="classes names name_suffixes"),
)

_CHECKPOINT = _table(
    flags="load_universal use_node_local_storage checkpoint_serialization",
    others="tag_validation",
    writer=_table(
        flags="io_buffer_double show_statistics decoupled",
        numbers="io_buffer_size io_multiplier",
        others="type data_parallel",
    ),
    parallel_write=_table(flags="pipeline_stage"),
)

_COMPILE = _table(
    flags="deepcompile autoep_non_moe free_activation offload_activation "
    "offload_activation_pin_memory offload_opt_states double_buffer symmetric_memory debug_log "
    "offload_parameters sync_before_reduce sync_after_reduce sync_before_allgather "
    "sync_after_allgather keep_int_input_tensors keep_all_input_tensors",
    numbers="free_activation_threshold",
    others="passes",
)

_EXPERT_PARALLEL = _table(
    flags="enabled validate_folding_routing async_split_plan use_grouped_mm "
    "disable_triton_grouped_mm route_norm has_shared_experts",
    numbers="autoep_size expert_tensor_parallel_size route_scale comm_num_sm comm_qp_margin "
    "comm_max_tokens_per_rank num_expert_groups num_limited_groups load_balance_coeff",
    autos="score_apply combine_impl row_weighting_impl score_func top_k routed_scaling_factor",
    others="preset_model moe_layer_pattern expert_pattern router_pattern gate_up_impl comm_backend "
    "expert_w1 expert_w2 expert_w3 num_experts_attr top_k_attr shared_experts_pattern "
    "shared_experts_gate_pattern expert_activation",
)

_TENSOR_PARALLEL_SIZES = _table(numbers="tp_size tp_grain_size", others="mpu tp_group")

_TENSOR_PARALLEL = _table(
    flags="tp_overlap_comm vocab_parallel_lm_head keep_module_on_host replace_with_kernel_inject "
    "kernel_inject",
    numbers="autotp_size",
    others="dtype vocab_parallel_ce_backend injection_policy_tuple preset_model",
    any_keys="partition_config",
    tensor_parallel=_TENSOR_PARALLEL_SIZES,
    tp=_TENSOR_PARALLEL_SIZES,
)

_AUTOTUNING = _table(
    flags="enabled fast overwrite",
    numbers="start_profile_step end_profile_step tuner_early_stopping tuner_num_trials mp_size "
    "max_train_batch_size min_train_batch_size max_train_micro_batch_size_per_gpu "
    "min_train_micro_batch_size_per_gpu num_tuning_micro_batch_sizes",
    others="results_dir exps_dir metric metric_path tuner_type model_info_path",
    any_keys="arg_mappings model_info",
)

KEYS = _table(
    flags="managed_gradient_accumulation dump_state disable_python_gc disable_allgather "
    "prescale_gradients zero_allow_untested_optimizer zero_force_ds_cpu_optimizer "
    "wall_clock_breakdown memory_breakdown use_data_before_expert_parallelism dataloader_drop_last",
    numbers="train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps "
    "steps_per_print gradient_clipping gradient_predivide_factor vocabulary_size "
    "sequence_parallel_size allgather_size",
    others="communication_data_type seq_parallel_communication_data_type gradient_allreduce_op "
    "log_level datastates_ckpt",
    any_keys="optimizer scheduler",
    bf16=_BF16,
    bfloat16=_BF16,
    fp16=_FP16,
    torch_autocast=_table(flags="enabled", others="dtype lower_precision_safe_modules"),
    data_types=_table(
        others="grad_accum_dtype param_dtype buffer_dtype", autos="keep_in_fp32_modules"
    ),
    zero_optimization=_ZERO,
    checkpoint=_CHECKPOINT,
    activation_checkpointing=_table(
        flags="partition_activations contiguous_memory_optimization cpu_checkpointing profile "
        "synchronize_checkpoint_boundary",
        numbers="number_checkpoints",
    ),
    aio=_table(
        flags="single_submit overlap_events use_gds",
        numbers="block_size queue_depth intra_op_parallelism",
    ),
    tensorboard=_table(flags="enabled", others="output_path job_name"),
    csv_monitor=_table(flags="enabled", others="output_path job_name"),
    wandb=_table(flags="enabled", others="group team project"),
    comet=_table(
        flags="enabled online",
        numbers="samples_log_interval",
        others="project workspace api_key experiment_name experiment_key mode",
    ),
    comms_logger=_table(flags="enabled prof_all verbose debug", others="prof_ops"),
    flops_profiler=_table(
        flags="enabled detailed",
        numbers="recompute_fwd_factor profile_step module_depth top_modules",
        others="output_file",
    ),
    timers=_table(throughput=_table(flags="enabled synchronized")),
    compile=_COMPILE,
    autotuning=_AUTOTUNING,
    expert_parallel=_EXPERT_PARALLEL,
    tensor_parallel=_TENSOR_PARALLEL,
    hybrid_engine=_table(
        flags="enabled release_inference_cache pin_parameters enable_cuda_graph",
        numbers="max_out_tokens inference_tp_size tp_gather_partition_size",
    ),
    weight_quantization=_table(
        flags="enabled",
        numbers="num_bits q_groups",
        others="q_type",
        any_keys="quantized_initialization post_init_quant",
    ),
    pipeline=_table(
        flags="seed_layers pipe_partitioned grad_partitioned use_reentrant",
        numbers="activation_checkpoint_interval",
        others="partition",
        autos="stages",
    ),
    data_efficiency=_table(flags="enabled", numbers="seed", any_keys="data_sampling data_routing"),
)
"""The keys of the whole file."""

REMOVED = {
    "nebula",
    "compression_training",
    "amp",
    "quantize_training",
    "sparse_gradients",
    "eigenvalue",
    "sparse_attention",
    "elasticity",
    "graph_harvesting",
    "curriculum_learning",
    "progressive_layer_drop",
    "zero_optimization.mics_shard_size",
    "zero_optimization.mics_hierarchical_params_gather",
    "zero_optimization.zeropp_loco_param",
}
"""Keys that DeepSpeed has removed."""

MONITOR_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
"""What each of DeepSpeed's monitors imports."""
