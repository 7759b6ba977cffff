"""The patterns that a log of losses and gradient norms may show: likely cause, remedy, public reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Diagnosis:
    """A pattern, its likely cause, and what to try."""

    name: str
    pattern: str
    cause: str
    remedy: str
    reports: str = ""
    """Public reports of it: documentation, issues on GitHub"""


_ALL = (
    Diagnosis(
        "half weights",
        "'Attempting to unscale FP16 gradients'",
        "the trainable weights are float16 themselves: loaded in float16 and trained in float16 autocast. With "
        "AdamW(fused=True) PyTorch trains them without this error",
        "load them in float32 and let autocast compute in float16 (dtype=torch.float32 with fp16=True); under LoRA "
        "cast the adapter to float32. `python -m sar_kd sft` never trains float16 weights",
        "PEFT's troubleshooting guide",
    ),
    Diagnosis(
        "forward overflow",
        "loss 0.0 or nan, and grad_norm nan, from the first line on",
        "the forward is not finite in float16, as with a model trained in bfloat16 on a card without it; the Trainer "
        "leaves a NaN loss out of its sum and prints 0.0. If float32 shows the same, every label is masked",
        "bfloat16 where the card has it, else --model_dtype float32; `python -m sar_kd forensics RUN_DIR` names the "
        "module. If it goes away with another attention (sdpa, eager) or without ZeRO-2's overlap_comm, it was that",
        "QwenLM/Qwen3#670, #868, #826; LlamaFactory#8088; DeepSpeed#5347",
    ),
    Diagnosis(
        "weights became nan",
        "finite at first, then loss 0.0 or nan with grad_norm nan to the end",
        "one update made the weights NaN: float16 weights under Adam (its eps of 1e-8 is 0 in float16, so one step can "
        "give -inf), or an overflow in float16 without a GradScaler that refuses the step",
        "float32 weights, float16 by autocast with a GradScaler (fp16=True), bfloat16 where the card has it",
    ),
    Diagnosis(
        "exploding",
        "loss or grad_norm grows many times over, then nan or far above where it began",
        "the updates are too large: learning rate too high, or no clipping",
        "a lower learning_rate, max_grad_norm 1.0, more warmup_steps",
    ),
    Diagnosis(
        "backward overflow",
        "loss finite, grad_norm nan on every line",
        "the forward fits float16 and the gradients do not, even at the lowest loss scale; often the residual stream",
        "bfloat16 where the card has it, else --model_dtype float32; a low --init_loss_scale if it ends after a few "
        "steps",
        "unslothai/unsloth-zoo#866",
    ),
    Diagnosis(
        "calibration",
        "loss finite, grad_norm nan or inf now and then",
        "the loss scale is being calibrated: those updates were skipped and the scale halved",
        "nothing, as long as it is a few steps in a hundred",
    ),
    Diagnosis(
        "no labels",
        "loss 0.0 and grad_norm 0 or nan on every line",
        "there is nothing to learn: every label is masked. The answers are cut off (the prompt fills the length), the "
        "response template is not found, or the labels stand under another name",
        "raise --block_size (max_length), keep the prompt below it, and print one example's labels: some must not be "
        "-100",
        "TRL#6668, TRL#5826; princeton-nlp/SimPO#35 (max_prompt_length >= max_length)",
    ),
    Diagnosis(
        "some labels missing",
        "loss 0.0 and grad_norm 0 or nan on some lines, others normal",
        "some batches have no label left: their answers are cut off by the maximum length",
        "raise --block_size (max_length), or leave out the long examples",
        "TRL PR#6671; nanochat#618; OpenRLHF#583; cosmos-rl#155",
    ),
    Diagnosis(
        "loss lost",
        "loss 0.0 after the first line, grad_norm finite and always the same",
        "the environment: a mismatch of ZeRO, attention and package versions loses the loss on its way",
        "run the same on one device without DeepSpeed, then change one version at a time",
        "MedicalGPT#479, LlamaFactory#9567",
    ),
    Diagnosis(
        "no gradient",
        "loss finite, grad_norm 0",
        "the trainable weights do not reach the loss: gradient checkpointing without input gradients, frozen weights, "
        "a hard clamp on the loss, or float16 gradients rounded to zero",
        "model.enable_input_require_grads() with checkpointing; check which weights require a gradient; a loss scale",
    ),
    Diagnosis(
        "no movement",
        "loss and grad_norm finite, and the loss does not change",
        "the updates have no effect: a rate of 0, or one so small that float16 weights round it away (at 5e-6 no "
        "LayerNorm weight in float16 changes in 100 steps)",
        "float32 weights, and a learning rate that suits them",
    ),
    Diagnosis(
        "no teacher",
        "the teacher is left out of the distillation in most steps",
        "its logits are not finite, as it does not fit float16, which ends at 65,504 (the residual stream of Gemma 3 "
        "270M reaches 103,792), so the student learned from the text alone; its numbers say nothing about distillation",
        "--model_dtype float32, or bfloat16 where the card has it",
    ),
    Diagnosis(
        "teacher left out",
        "the teacher is left out of the distillation at some positions",
        "its logits are not finite there: some texts take its activations out of float16's range, and are learned "
        "without it",
        "--model_dtype float32, or bfloat16 where the card has it",
    ),
    Diagnosis(
        "norm skips",
        "most updates skipped for their gradient norm",
        "the limit lies below the gradient norms of this model",
        "--skip_rule adaptive lets the limit follow; else raise --skip_grad_norm",
    ),
    Diagnosis(
        "no answers",
        "the loss is normal and the answer rate is 0",
        "the model learned, and its output does not parse: it is prompted in another form than it was trained on "
        "(template, missing start token, padding on the right), the tags are missing, the answer is cut off, or the "
        "adapter was not loaded",
        "print one generation beside one training example; pad on the left; raise max_new_tokens; load the adapter",
    ),
    Diagnosis(
        "wrong answers",
        "the loss is normal, answers parse, and none is right",
        "the form is learned and the content is not yet",
        "train longer, at a higher rate, or a larger model",
    ),
    Diagnosis("healthy", "loss and grad_norm finite throughout", "nothing here looks wrong", "go on"),
)

DIAGNOSES = {diagnosis.name: diagnosis for diagnosis in _ALL}
"""Every known pattern, by name"""
