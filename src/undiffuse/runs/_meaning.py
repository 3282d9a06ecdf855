"""From a run's settings to what the network's output means and which noise it is trained on."""

from dataclasses import replace

from undiffuse import images
from undiffuse.augmentation import Augment
from undiffuse.checkpoint import Loaded, Model
from undiffuse.config import BetaSchedule, ModelConfig, PredictionType
from undiffuse.denoiser import (
    Epsilon,
    FlowVelocity,
    HighNoise,
    KarrasPrecond,
    LevelSampling,
    LogNormal,
    MinSnr,
    OnGrid,
    Prediction,
    Sample,
    Velocity,
    Weighting,
    uniform_t,
    unweighted,
)
from undiffuse.errors import ConfigError
from undiffuse.noise import (
    Cosine,
    Flow,
    Karras,
    LinearBetas,
    ScaledLinearBetas,
    Schedule,
    Sigmoid,
)
from undiffuse.spec import UNetSpec
from undiffuse.training import Recipe

# What each schedule's own paper predicts: the default where no prediction type is named.
USUAL = {
    BetaSchedule.KARRAS: PredictionType.KARRAS,
    BetaSchedule.LINEAR: PredictionType.EPSILON,
    BetaSchedule.SCALED_LINEAR: PredictionType.EPSILON,
    BetaSchedule.COSINE: PredictionType.EPSILON,
    BetaSchedule.SIGMOID: PredictionType.V_PREDICTION,  # denoising-diffusion-pytorch
    BetaSchedule.FLOW: PredictionType.FLOW,
}


SPREAD = 0.5  # of pictures, where the prediction type does not know theirs


def settled(config: ModelConfig, initial: Model | None) -> ModelConfig:
    """With schedule and prediction type named, unless both are the initial model's own.

    Raises:
        ConfigError: the prediction divides by alpha, which the schedule lets reach 0.
    """
    if config.beta_schedule is None and initial is not None:
        return config
    schedule = config.beta_schedule or BetaSchedule.KARRAS
    return replace(
        config, beta_schedule=schedule, prediction_type=_prediction_type(config, schedule)
    )


def _prediction_type(config: ModelConfig, schedule: BetaSchedule) -> PredictionType:
    chosen = config.prediction_type or USUAL[schedule]
    divides = chosen in (PredictionType.EPSILON, PredictionType.KARRAS)
    if schedule is BetaSchedule.FLOW and divides:
        raise ConfigError(
            f"prediction_type {chosen.value} does not work with beta_schedule flow, whose alpha"
            " reaches 0; use flow, v_prediction or sample"
        )
    return chosen


def meaning(
    config: ModelConfig, data: images.Data, resumed: Loaded | None, initial: Model | None
) -> tuple[Schedule, Prediction]:
    """What the output means; a checkpoint's sigma_data stays, even if the pictures changed.

    `config` is `settled`: what it leaves open is as in the initial model.
    """
    if resumed is not None:
        return resumed.header.schedule, resumed.header.prediction
    given = None if initial is None else initial.denoiser
    schedule = _schedule(config) if config.beta_schedule or not given else given.schedule
    kept = given if config.prediction_type is None else None
    return schedule, kept.prediction if kept else _prediction(config, data)


def meaning_notes(
    initial: Model | None, schedule: Schedule, prediction: Prediction
) -> tuple[str, ...]:
    """Other outputs than the initial weights were made for have to be learned anew."""
    if initial is None:
        return ()
    before = (type(initial.denoiser.prediction), type(initial.denoiser.schedule))
    now = (type(prediction), type(schedule))
    if before == now:
        return ()
    words = [f"{one.__name__} on {other.__name__}" for one, other in (before, now)]
    return (f"init_from predicts {words[0]}, this run {words[1]}: see --prediction-type",)


def _schedule(config: ModelConfig) -> Schedule:
    match config.beta_schedule:
        case BetaSchedule.KARRAS | None:
            return Karras()
        case BetaSchedule.LINEAR:
            return LinearBetas(config.num_train_timesteps)
        case BetaSchedule.SCALED_LINEAR:
            return ScaledLinearBetas(config.num_train_timesteps)
        case BetaSchedule.COSINE:
            return Cosine(config.num_train_timesteps)
        case BetaSchedule.SIGMOID:
            return Sigmoid(config.num_train_timesteps)
        case BetaSchedule.FLOW:
            return Flow()


def _prediction(config: ModelConfig, data: images.Data) -> Prediction:
    match config.prediction_type:
        case PredictionType.KARRAS | None:
            return KarrasPrecond(_spread(data.train))
        case PredictionType.EPSILON:
            return Epsilon(config.num_train_timesteps)
        case PredictionType.SAMPLE:
            return Sample(config.num_train_timesteps)
        case PredictionType.V_PREDICTION:
            return Velocity(config.num_train_timesteps)
        case PredictionType.FLOW:
            return FlowVelocity(config.num_train_timesteps)


def _spread(data: images.Dataset, most: int = 2048) -> float:
    """sigma_data: the standard deviation of the training pixels, to three digits."""
    x0, _ = data.fixed(most)
    return max(0.01, round(float(x0.double().std()), 3))


def recipe_of(
    config: ModelConfig,
    schedule: Schedule,
    prediction: Prediction,
    spec: UNetSpec,
    augment: float = 0.0,
) -> Recipe:
    """`augment` is the probability of each transformation."""
    weighting = _weighting(config, prediction)
    levels = _level_sampling(config, schedule)
    transforms = Augment(augment) if augment else None
    return Recipe(schedule, levels, weighting, spec.classes, transforms)


def _weighting(config: ModelConfig, prediction: Prediction) -> Weighting:
    if config.snr_gamma and config.high_noise_weight:
        raise ConfigError(
            f"high_noise_weight {config.high_noise_weight:g} and snr_gamma {config.snr_gamma:g}"
            " weight the loss against each other; leave one out"
        )
    if config.snr_gamma:
        return MinSnr(prediction, config.snr_gamma)
    if config.high_noise_weight:
        spread = prediction.sigma_data if isinstance(prediction, KarrasPrecond) else SPREAD
        return HighNoise(spread, config.high_noise_weight)
    return unweighted


def _level_sampling(config: ModelConfig, schedule: Schedule) -> LevelSampling:
    """The paper's own choice for each schedule."""
    match schedule:
        case Karras():
            return LogNormal(config.p_mean, config.p_std)
        case LinearBetas() | ScaledLinearBetas() | Cosine() | Sigmoid():
            return OnGrid(schedule.steps)
        case _:
            return uniform_t
