"""The schedulers of diffusers: what they say about the noise, and what can be told to them.

Most of them are samplers of one process, whose betas and prediction they repeat; those are read.
How one samples (their spacing, order, clipping) is no part of a network's meaning: where a sampler
here has to be told something to give the same pictures, a note says so.
"""

from collections.abc import Callable, Iterator, Mapping

from undiffuse.denoiser import Epsilon, FlowVelocity, KarrasPrecond, Prediction, Sample, Velocity
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.interop._diffusers_json import SHORT, Config, Fields, Legal
from undiffuse.noise import Cosine, Flow, Karras, LinearBetas, ScaledLinearBetas, Schedule

Meaning = tuple[Schedule, Prediction, tuple[str, ...]]

# Samplers of one and the same process, with the betas each of them has by default.
_USUAL, _LATENT = (1e-4, 0.02), (0.00085, 0.012)
_BETA_SCHEDULERS: Mapping[str, tuple[float, float]] = {
    "DDPMScheduler": _USUAL,
    "DDPMParallelScheduler": _USUAL,
    "DDIMScheduler": _USUAL,
    "DDIMParallelScheduler": _USUAL,
    "PNDMScheduler": _USUAL,
    "DPMSolverMultistepScheduler": _USUAL,
    "DPMSolverSinglestepScheduler": _USUAL,
    "UniPCMultistepScheduler": _USUAL,
    "DEISMultistepScheduler": _USUAL,
    "EulerDiscreteScheduler": _USUAL,
    "EulerAncestralDiscreteScheduler": _USUAL,
    "LMSDiscreteScheduler": _USUAL,
    "HeunDiscreteScheduler": _LATENT,
    "KDPM2DiscreteScheduler": _LATENT,
    "KDPM2AncestralDiscreteScheduler": _LATENT,
}
_EDM_SCHEDULERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
_FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler",)

# How one samples, not what the network has learned.
_SAMPLING = """
    algorithm_type base_image_seq_len base_shift clip_sample clip_sample_range disable_corrector
    dynamic_thresholding_ratio euler_at_final final_sigmas_type flow_shift interpolation_type
    lambda_min_clipped lower_order_final max_image_seq_len max_shift predict_x0 rho sample_max_value
    set_alpha_to_one shift shift_terminal sigma_max sigma_min sigma_schedule skip_prk_steps
    solver_order solver_p solver_type steps_offset stochastic_sampling tensor_format thresholding
    time_shift_type timestep_spacing timestep_values use_beta_sigmas use_dynamic_shifting
    use_exponential_sigmas use_karras_sigmas use_lu_lambdas variance_type
"""
_BETA_FIELDS = """
    beta_end beta_schedule beta_start num_train_timesteps predict_epsilon prediction_type
    rescale_betas_zero_snr timestep_type trained_betas use_flow_sigmas
"""


def meaning_of(scheduler: Config | None) -> Meaning:
    """Schedule, prediction and notes.

    Raises:
        CheckpointError: the scheduler, a field of it or its value cannot be expressed.
    """
    if scheduler is None:
        note = "no scheduler is given: DDPM's linear schedule of 1000 steps and epsilon are assumed"
        return LinearBetas(), Epsilon(), (note,)
    every = (*_BETA_SCHEDULERS, *_EDM_SCHEDULERS, *_FLOW_SCHEDULERS)
    kind = Fields("diffusers scheduler", scheduler).check_class(every)
    fields = Fields(f"diffusers {kind}", scheduler)
    try:
        if kind in _EDM_SCHEDULERS:
            return _edm_meaning(fields)
        return _flow_meaning(fields) if kind in _FLOW_SCHEDULERS else _beta_meaning(fields, kind)
    except ConfigError as error:  # a schedule of ours with such numbers
        raise CheckpointError(f"diffusers {kind}: {error}") from error


def _beta_meaning(fields: Fields, kind: str) -> Meaning:
    fields.check_known(_BETA_FIELDS + _SAMPLING)
    fields.only("trained_betas", None)
    fields.only("predict_epsilon", True)  # before prediction_type
    fields.only("rescale_betas_zero_snr", False)
    fields.only("use_flow_sigmas", False)
    fields.only("timestep_type", "discrete")
    steps = fields.whole("num_train_timesteps", 1000, least=2, most=10**6)
    first, last = _BETA_SCHEDULERS[kind]
    first, last = fields.number("beta_start", first), fields.number("beta_end", last)
    make = fields.one_of("beta_schedule", "linear", _BETA_SCHEDULES)
    predictions: Legal[Callable[[int], Prediction]] = {
        "epsilon": Epsilon,
        "sample": Sample,
        "v_prediction": Velocity,
    }
    prediction = fields.one_of("prediction_type", "epsilon", predictions)
    return make(steps, first, last), prediction(steps), tuple(_sampling_notes(fields, kind))


_BETA_SCHEDULES: Legal[Callable[[int, float, float], Schedule]] = {
    "linear": LinearBetas,
    "scaled_linear": ScaledLinearBetas,
    "squaredcos_cap_v2": lambda steps, first, last: Cosine(steps),
}

# They go on with the noise of the unclipped estimate unless told otherwise.
_KEEPS_NOISE = {"DDIMScheduler", "DDIMParallelScheduler"}
_CLIPPING = {"DDPMScheduler", "DDPMParallelScheduler", *_KEEPS_NOISE}


def _sampling_notes(fields: Fields, kind: str) -> Iterator[str]:
    """What a sampler of ours must do to give the same pictures."""
    if fields.flag("thresholding", False):
        ratio = fields.number("dynamic_thresholding_ratio", 0.995)
        yield f"the scheduler clips to the {ratio:g} quantile (thresholding); no sampler here does"
    elif fields.flag("clip_sample", kind in _CLIPPING):
        yield from _clipping_notes(fields, kind)
    variance = fields.values.get("variance_type") or "fixed_small"
    if variance != "fixed_small":
        yield (
            f"the scheduler samples with variance_type={SHORT.repr(variance)}; `ddpm` here has the"
            " variance of the posterior (fixed_small)"
        )


def _clipping_notes(fields: Fields, kind: str) -> Iterator[str]:
    r = fields.number("clip_sample_range", 1.0)
    if r <= 0:
        raise fields.refusal("clip_sample_range", r, "a number above 0")
    if r != 1:  # which is what pictures are always clipped to here
        same = " (their use_clipped_model_output=True)" if kind in _KEEPS_NOISE else ""
        yield (
            f"the scheduler clips the estimate of x0 to [{-r:g}, {r:g}], pictures generated here"
            f" are clipped to [-1, 1]; a sampler can be given clipped(denoise, {-r:g}, {r:g}){same}"
        )


def _edm_meaning(fields: Fields) -> Meaning:
    fields.check_known(_SAMPLING + " num_train_timesteps prediction_type sigma_data")
    fields.only("prediction_type", "epsilon")
    low, high = fields.number("sigma_min", 0.002), fields.number("sigma_max", 80.0)
    return Karras(low, high), KarrasPrecond(fields.number("sigma_data", 0.5)), ()


def _flow_meaning(fields: Fields) -> Meaning:
    fields.check_known(_SAMPLING + " invert_sigmas num_train_timesteps")
    fields.only("invert_sigmas", False)
    steps = fields.whole("num_train_timesteps", 1000)
    shift, notes = fields.number("shift", 1.0), tuple[str, ...]()
    if shift != 1.0:
        notes = (f"the scheduler crowds its steps by shift={shift:g}, which no spacing here does",)
    return Flow(), FlowVelocity(steps + 1), notes  # their network is told steps * t


# --- out ----------------------------------------------------------------------------------------


def scheduler_config(schedule: Schedule, prediction: Prediction) -> dict[str, object]:
    match schedule, prediction:
        case Karras(low, high), KarrasPrecond(data):
            sigmas = {"sigma_min": low, "sigma_max": high, "sigma_data": data}
            return {"_class_name": _EDM_SCHEDULERS[0], **sigmas, "prediction_type": "epsilon"}
        case Flow(), FlowVelocity(steps):
            return {"_class_name": _FLOW_SCHEDULERS[0], "num_train_timesteps": steps - 1}
        case _:
            steps, betas = _betas(schedule)
            return {
                "_class_name": "DDPMScheduler",
                "num_train_timesteps": steps,
                **betas,
                "prediction_type": _prediction_type(prediction, steps, schedule),
                "clip_sample": True,
                "clip_sample_range": 1.0,
                "timestep_spacing": "trailing",
            }


def _betas(schedule: Schedule) -> tuple[int, dict[str, object]]:
    match schedule:
        case LinearBetas(steps, first, last):
            return steps, _named_betas("linear", first, last)
        case ScaledLinearBetas(steps, first, last):
            return steps, _named_betas("scaled_linear", first, last)
        case Cosine(steps) if schedule == Cosine(steps):
            return steps, _named_betas("squaredcos_cap_v2", *_USUAL)  # which has none to read
        case Cosine():
            raise ConfigError(f"schedule {schedule}: diffusers has only {Cosine(schedule.steps)}")
        case _:
            raise ConfigError(
                f"schedule {type(schedule).__name__}: diffusers has LinearBetas, ScaledLinearBetas"
                " and Cosine, Karras with KarrasPrecond, and Flow with FlowVelocity"
            )


def _named_betas(name: str, first: float, last: float) -> dict[str, object]:
    return {"beta_schedule": name, "beta_start": first, "beta_end": last}


def _prediction_type(prediction: Prediction, steps: int, schedule: Schedule) -> str:
    """Their name for the prediction, if the network is told what their pipelines tell it."""
    names: Mapping[str, Prediction] = {
        "epsilon": Epsilon(steps),
        "sample": Sample(steps),
        "v_prediction": Velocity(steps),
    }
    for name, known in names.items():
        if known == prediction:
            return name
    raise ConfigError(
        f"prediction {prediction} with schedule {type(schedule).__name__}(steps={steps}):"
        f" diffusers has only {', '.join(str(one) for one in names.values())}"
    )
