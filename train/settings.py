"""Every setting of the training programs with its default; `--help` prints these comments.

Settings that everyone uses are flat, the rest stand in groups. A default that follows another setting is None here and
filled in by `__post_init__`, which raises ValueError for values that cannot be.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import ClassVar, Literal

from prior import PriorConfig
from tokenizer import TokenizerConfig, VAEConfig
from tokenizer.config import ImageConfig

PHOTOGRAPHS = "photographs"  # the embedded ones, see train/sources.py
SMALLEST_PERCEPTUAL = {"vgg": 16, "alex": 31, "squeeze": 17}  # pixels a side that leave LPIPS's last layer something


@dataclass
class OptimizerSettings:
    name: Literal["adamw", "muon"] = "adamw"  # muon: of kernels and matrices, AdamW for the rest; learns in fewer steps
    beta1: float = 0.9  # AdamW's memory of gradients
    beta2: float = 0.99  # and of their squares
    weight_decay: float = 0.0  # of matrices and kernels, decoupled, times the learning rate
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    accumulation_steps: int = 1  # batches whose gradients make one step
    on_nonfinite: Literal["stop", "skip"] = "stop"  # what a NaN or infinite loss or gradient does to the run

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}={getattr(self, name)}", "lie in [0, 1)")
        require(0 <= self.weight_decay < math.inf, f"optimizer.weight_decay={self.weight_decay}", "be finite and >= 0")
        require(self.max_grad_norm > 0, f"optimizer.max_grad_norm={self.max_grad_norm}", "be above 0; .inf never clips")
        given = f"optimizer.accumulation_steps={self.accumulation_steps}"
        require(self.accumulation_steps >= 1, given, "be at least 1")


@dataclass
class AverageSettings:
    decay: float = 0.0  # per step, of averaged weights and codebook statistics, which are then what is kept; 0: none


@dataclass
class SourceSettings:
    subset: str | None = None  # of a Hub dataset that has several ("configs" there)
    image_column: str | None = None  # default: the only column of images
    label_column: str | None = None  # default: the only column of classes, where there is one
    max_corrupt_fraction: float = 0.01  # share of unreadable images that stops the run

    def __post_init__(self) -> None:
        share = self.max_corrupt_fraction
        require(0 <= share <= 1, f"data_options.max_corrupt_fraction={share}", "lie in [0, 1]")


@dataclass
class DataSettings(SourceSettings):
    flip: bool = True  # mirror half of the training images
    shuffle_colors: float | None = None  # share of crops with shuffled channels; default 0.5 if data=photographs
    shuffle_buffer: int = 1000  # images held to shuffle a stream
    eval_images: int = 256  # at most so many validation images, the first ones

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("shuffle_buffer", "eval_images"):
            require(getattr(self, name) >= 1, f"data_options.{name}={getattr(self, name)}", "be at least 1")


@dataclass
class LossSettings:
    reconstruction: Literal["l1", "l2", "gaussian"] = "l2"  # mean over pixels and channels; gaussian: -log p in nats
    reconstruction_weight: float | None = None  # against the losses of the quantizer; default 10, of gaussian 1
    sigma: float | None = None  # deviation of gaussian on the [0, 1] scale; default: learned, one for all pixels
    sigma_learning_rate: float = 0.01  # highest, of log(sigma) where it is learned; same schedule
    perceptual: Literal["vgg", "alex", "squeeze"] | None = None  # LPIPS by that network, downloaded when first used
    perceptual_weight: float = 1.0  # of LPIPS, mean over the images

    def __post_init__(self) -> None:
        require(self.sigma is None or self.sigma > 0, f"loss.sigma={self.sigma}", "be above 0, or null to be learned")
        require(self.sigma_learning_rate > 0, f"loss.sigma_learning_rate={self.sigma_learning_rate}", "be above 0")
        for name in ("reconstruction_weight", "perceptual_weight"):
            weight = getattr(self, name)
            require(weight is None or 0 <= weight < math.inf, f"loss.{name}={weight}", "be finite and >= 0")

    def complete(self) -> "LossSettings":
        """Fill in what follows other settings, once all are known."""
        if self.reconstruction_weight is None:
            self.reconstruction_weight = 1.0 if self.reconstruction == "gaussian" else 10.0
        return self

    @property
    def learns_sigma(self) -> bool:
        return self.reconstruction == "gaussian" and self.sigma is None


@dataclass
class AdversarialSettings:
    loss: Literal["hinge", "non_saturating"] | None = None  # of a patch discriminator (PatchGAN); null: there is none
    weight: float = 0.1  # of the tokenizer's loss against it
    adaptive: bool = True  # times |gradient of the reconstruction losses| / |its own| at the decoder's last kernel
    max_adaptive_weight: float = 1e4  # that ratio is at most this
    start_step: int | None = None  # steps before the discriminator begins to learn; default steps // 2
    ramp_steps: int | None = None  # steps in which `weight` then rises from 0; default steps // 20
    lecam_weight: float = 0.001  # of LeCam, which holds its logits near the mean of the other side; 0: none
    lecam_decay: float = 0.99  # per step, of these means
    learning_rate: float = 2e-4  # highest, of the discriminator; same schedule
    beta1: float = 0.5  # AdamW's memory of its gradients; beta2 is optimizer.beta2
    base_channels: int = 64  # of its first convolution; each later one doubles them, up to 8 times as many
    num_layers: int = 3  # convolutions that halve the side; 3 judges patches of 70 pixels, 2 of 34, 1 of 16

    def __post_init__(self) -> None:
        for name in ("base_channels", "num_layers"):
            require(getattr(self, name) >= 1, f"adversarial.{name}={getattr(self, name)}", "be >= 1")
        for name in ("weight", "max_adaptive_weight", "lecam_weight"):
            require(
                0 <= getattr(self, name) < math.inf, f"adversarial.{name}={getattr(self, name)}", "be finite and >= 0"
            )
        for name in ("lecam_decay", "beta1"):
            require(0 <= getattr(self, name) < 1, f"adversarial.{name}={getattr(self, name)}", "lie in [0, 1)")
        require(self.learning_rate > 0, f"adversarial.learning_rate={self.learning_rate}", "be above 0")
        require(self.ramp_steps is None or self.ramp_steps >= 0, f"adversarial.ramp_steps={self.ramp_steps}", "be >= 0")

    @property
    def smallest_image(self) -> int:
        """Pixels a side that leave the discriminator's last layer something."""
        return 3 * 2**self.num_layers

    def complete(self, run: "AutoencoderRun") -> None:
        """Fill in what follows the run's length; ValueError for what does not go with the run."""
        require(
            self.start_step is None or 0 <= self.start_step < run.steps,
            f"adversarial.start_step={self.start_step}",
            f"be >= 0 and < steps={run.steps}, or the discriminator never learns; lower it, or null for steps // 2",
        )
        if self.start_step is None:
            self.start_step = run.steps // 2
        if self.ramp_steps is None:
            self.ramp_steps = run.steps // 20
        if self.loss is not None:
            require(
                run.image_size >= self.smallest_image,
                f"image_size={run.image_size}",
                f"be >= {self.smallest_image} for adversarial.num_layers={self.num_layers}; a layer less halves that",
            )
            require(
                run.mixed_precision != "fp16",
                f"mixed_precision={run.mixed_precision}",
                f"be bf16 or no with adversarial.loss={self.loss}: two losses at odds do not share one loss scale",
            )


@dataclass
class ThreadSettings:
    threads: int | None = None  # of each rank on CPU; default: the cores shared among the ranks of the machine

    def __post_init__(self) -> None:
        require(self.threads is None or self.threads >= 1, f"speed.threads={self.threads}", "be at least 1, or null")


@dataclass
class SpeedSettings(ThreadSettings):
    compile: bool = False  # torch.compile; needs a C++ compiler on CPU


@dataclass
class PriorSpeedSettings(SpeedSettings):
    activation_checkpointing: bool = False  # a third more time for much less memory


@dataclass
class CardSettings:
    license: str | None = None  # of what is published; required to publish
    data: str | None = None  # what the data is; default: the setting `data`
    data_license: str | None = None  # required to publish


@dataclass
class PublishedOutput:
    """Settings of every program: where its output goes."""

    output_dir: str = ""  # the folder that it makes
    push_to_hub: str | None = None  # repo id to publish to, or null
    card: CardSettings = field(default_factory=CardSettings)

    free_settings: ClassVar[tuple[str, ...]] = ("output_dir", "push_to_hub", "card")  # these leave the result as it is

    def __post_init__(self) -> None:
        if self.push_to_hub:
            missing = [f"card.{name}=..." for name in ("license", "data_license") if not getattr(self.card, name)]
            require(not missing, f"push_to_hub={self.push_to_hub}", f"come with {' and '.join(missing)}")


@dataclass
class TrainingRun(PublishedOutput):
    """Settings of every training program. Those left empty that depend on the run's length follow `steps`."""

    steps: int = 1000  # optimizer steps
    batch_size: int = 16  # samples per rank and optimizer step, or per batch that is accumulated
    learning_rate: float = 1e-3  # highest, after the warm-up; then a cosine down to zero
    warmup_steps: int | None = None  # optimizer steps; default steps // 20
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"  # of the networks; losses stay in float32
    seed: int = 0  # of everything random
    eval_every: int | None = None  # steps; default steps // 10
    save_every: int | None = None  # steps between checkpoints; default steps // 10
    keep_checkpoints: int = 2  # older ones are deleted
    log_with: Literal["tensorboard", "wandb"] | None = None  # beside metrics.jsonl
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    average: AverageSettings = field(default_factory=AverageSettings)
    speed: SpeedSettings = field(default_factory=SpeedSettings)

    free_settings: ClassVar[tuple[str, ...]] = (
        *PublishedOutput.free_settings, "save_every", "keep_checkpoints", "log_with",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "steps", "batch_size", "eval_every", "save_every", "keep_checkpoints")
        require(0 <= self.average.decay < 1, f"average.decay={self.average.decay}", "lie in [0, 1)")
        require(0 < self.learning_rate < math.inf, f"learning_rate={self.learning_rate}", "be finite and above 0")
        require(0 <= self.seed < 2**32, f"seed={self.seed}", "lie in [0, 2^32)")
        require(
            self.warmup_steps is None or 0 <= self.warmup_steps <= self.steps,
            f"warmup_steps={self.warmup_steps}",
            f"lie in 0..steps={self.steps}",
        )
        if self.warmup_steps is None:
            self.warmup_steps = self.steps // 20
        self.eval_every = self.eval_every or max(1, self.steps // 10)
        self.save_every = self.save_every or max(1, self.steps // 10)


@dataclass
class AutoencoderRun(TrainingRun):
    """Settings of every program that trains a model of images; `model` is the config of its kind."""

    data: str = PHOTOGRAPHS  # embedded ones; or a folder, a file, a pattern, or a Hub id such as uoft-cs/cifar10
    split: str = "train"  # split to train on
    eval_split: str | None = None  # default: validation, else test, else as if it were `split`: a seeded 2% held out
    streaming: bool = False  # read the data as it comes, never the whole of it on disk
    image_size: int = 64  # pixels, side of the random training crop; limits nothing afterwards
    num_workers: int = 2  # processes per rank that decode images
    steps: int = 700  # optimizer steps
    learning_rate: float = 1.5e-3  # highest, after the warm-up; then a cosine down to zero
    model: ImageConfig = field(default_factory=ImageConfig)
    data_options: DataSettings = field(default_factory=DataSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    adversarial: AdversarialSettings = field(default_factory=AdversarialSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "image_size")
        require(self.num_workers >= 0, f"num_workers={self.num_workers}", "be >= 0")
        if self.data_options.shuffle_colors is None:
            self.data_options.shuffle_colors = 0.5 if self.data == PHOTOGRAPHS else 0.0
        smallest = SMALLEST_PERCEPTUAL.get(self.loss.perceptual, 1)
        require(
            self.image_size >= smallest,
            f"image_size={self.image_size}",
            f"be >= {smallest} for loss.perceptual={self.loss.perceptual}; vgg takes the smallest pictures, from 16 on",
        )
        self.loss.complete()
        self.adversarial.complete(self)
        share = self.data_options.shuffle_colors
        require(0 <= share <= 1, f"data_options.shuffle_colors={share}", "lie in [0, 1]")
        self.free_settings = (*self.free_settings, "data_options.max_corrupt_fraction")
        if not self.streaming:  # there the workers share out the rows, and so decide their order
            self.free_settings = (*self.free_settings, "num_workers")


@dataclass
class TokenizerRun(AutoencoderRun):
    """Settings of train/vqvae.py. Those left empty that depend on the run's length follow `steps`."""

    output_dir: str = "runs/vqvae"  # the run's folder
    model: TokenizerConfig = field(default_factory=TokenizerConfig)


@dataclass
class VAERun(AutoencoderRun):
    """Settings of train/vae.py. Those left empty that depend on the run's length follow `steps`."""

    output_dir: str = "runs/vae"  # the run's folder
    model: VAEConfig = field(default_factory=VAEConfig)
    loss: LossSettings = field(default_factory=lambda: LossSettings(reconstruction="gaussian"))

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.loss.reconstruction == "gaussian",
            f"loss.reconstruction={self.loss.reconstruction}",
            "be gaussian: the ELBO needs a likelihood; l2 is that of a fixed deviation, loss.sigma=...",
        )


@dataclass
class StoreRun(PublishedOutput):
    """Settings of train/encode_dataset.py."""

    output_dir: str = "tokens"  # the token store's folder
    tokenizer: str = "runs/vqvae"  # folder or repo id of the tokenizer
    data: str = PHOTOGRAPHS  # embedded ones; or a folder, a file, a pattern, or a Hub id such as uoft-cs/cifar10
    split: str = "train"  # split that becomes `train`
    eval_split: str | None = None  # becomes `validation`; default: validation, else test, else `split`: 2% held out
    streaming: bool = False  # read the data as it comes, never the whole of it on disk; a shard for each of its files
    image_size: int = 64  # pixels, side of the square that is encoded
    views: Literal["center", "flip", "ten_crop", "random_crops"] | None = None  # default center; of photographs crops
    num_crops: int = 256  # of each image where views=random_crops
    fast: bool = False  # encode as `tokenizer.fast()` does, where bfloat16 is faster: a few tokens in 1,000 are others
    batch_size: int = 64  # pictures encoded at once
    rows_per_shard: int = 10_000  # images of one file of the store
    seed: int = 0  # of the crops and of the images held out
    num_workers: int = 2  # processes per rank that decode images
    data_options: SourceSettings = field(default_factory=SourceSettings)
    speed: ThreadSettings = field(default_factory=ThreadSettings)

    free_settings: ClassVar[tuple[str, ...]] = (
        *PublishedOutput.free_settings, "batch_size", "num_workers", "speed", "data_options.max_corrupt_fraction",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "image_size", "num_crops", "batch_size", "rows_per_shard")
        require(self.num_workers >= 0, f"num_workers={self.num_workers}", "be >= 0")
        require(0 <= self.seed < 2**32, f"seed={self.seed}", "lie in [0, 2^32)")
        if self.views is None:
            self.views = "random_crops" if self.data == PHOTOGRAPHS else "center"


@dataclass
class PriorSettings:
    """The network; what it models (vocabulary, grid, classes) is the token store's."""

    width: int = 128  # components of the residual stream
    num_layers: int = 4  # blocks, each attention and feed-forward
    num_heads: int = 2  # each of width / num_heads components, a multiple of 4
    dropout: float = 0.1  # of the embeddings and of what each branch adds to the residual stream
    class_dropout: float = 0.1  # share of labels dropped in training; 0 gives up classifier-free guidance

    def __post_init__(self) -> None:
        PriorConfig(vocab_size=2, grid_size=[1, 1], **asdict(self))  # refuses a network that cannot be built


@dataclass
class PriorRun(TrainingRun):
    """Settings of train/token_prior.py. Those left empty that depend on the run's length follow `steps`."""

    output_dir: str = "runs/prior"  # the run's folder
    tokens: str | None = None  # token store: a folder or a Hub dataset id; default: `tokens/`, written from photographs
    tokenizer: str = "runs/vqvae"  # folder or repo id of the tokenizer that made the store; it draws the pictures
    conditional: bool = True  # on the classes of the store, where it has some
    steps: int = 200  # optimizer steps
    learning_rate: float = 3e-3  # highest, after the warm-up; then a cosine down to zero
    eval_every: int | None = None  # steps; default steps // 5
    eval_grids: int = 100  # at most so many of training and of validation are measured at each evaluation
    model: PriorSettings = field(default_factory=PriorSettings)
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(beta2=0.95, weight_decay=0.05))
    speed: PriorSpeedSettings = field(default_factory=PriorSpeedSettings)

    def __post_init__(self) -> None:
        if self.eval_every is None:
            self.eval_every = max(1, self.steps // 5)
        super().__post_init__()
        at_least_one(self, "eval_grids")


def require(condition: bool, given: str, rule: str) -> None:
    """Raise the ValueError that a setting breaks a rule."""
    if not condition:
        raise ValueError(f"{given} must {rule}")


def at_least_one(run: PublishedOutput, *names: str) -> None:
    """Raise ValueError where one of the numbers is given and below 1."""
    for name in names:
        value = getattr(run, name)
        require(value is None or value >= 1, f"{name}={value}", "be >= 1")
