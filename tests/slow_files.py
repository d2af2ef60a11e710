"""Test files that take more than some three seconds: `make test-fast` leaves them out."""

from __future__ import annotations

# folder of tests/ → test_NAME.py
SLOW = {
    "": "guide make wheel",
    "cli": (
        "bad_bundles bad_checkpoints bench_command build_command demo editing_commands "
        "export_cut_short files_to_images int8 labels_command linked_bundle outputs prompts "
        "sample sample_prompts"
    ),
    "cluster": "connect place prompts service sets",
    "contract": "every_command files installation interfaces onnx_file plan terminal",
    "datasets": "readers",
    "deploy": "steps",
    "export": (
        "accumulate bisect bundle bundle_files checkpoint golden gpt2_bundle gpt2_files "
        "infinity_bundle infinity_files infinity_presets infinity_random infinity_reference "
        "infinity_verify int8_bundle int8_probe lint modules more_smooth not_finite "
        "one_scale random_weights recognise sample_study sampler t5 text_baselines "
        "text_encoder_files text_encoder_graph torch_bench torch_graph torch_peers verify "
        "verify_golden verify_int8"
    ),
    "fuzz": "bundles checkpoints harness requests",
    "runtime": (
        "backends bench_rounds cold_load device_check editing engine_build not_finite "
        "one_copy onnxruntime_cuda openvino_peer pipeline plan_against_cpu replaced_bundles "
        "sampler_statistics sampling_schedules tensorrt_rtx tensorrt_session text_encoder"
    ),
    "serving": (
        "bodies connections load page page_classes page_prompts page_states queue "
        "serve_command"
    ),
    "tools": "drawings fp16_study fp16_text_study golden growth pocket pocket_text training",
    "tritonserver": "server",
}
FILES = {
    f"{folder}/test_{name}.py".lstrip("/")
    for folder, names in SLOW.items()
    for name in names.split()
}
