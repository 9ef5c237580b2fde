"""Train a Gaussian VAE: accelerate launch train/vae.py [preset.yaml] [key=value ...]; --help prints the keys.

The loop is that of train/vqvae.py: resuming, ranks, bad steps and publishing are the same.
"""

from train.config import launch
from train.settings import VAERun
from train.vqvae import main

if __name__ == "__main__":
    launch(main, VAERun)
