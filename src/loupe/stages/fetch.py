"""Fetch the built-in data set and write it as PNG class folders."""

import logging

from loupe.config import Params
from loupe.data.fashion_mnist import obtain_files, write_images
from loupe.stages.files import BUILT_IN, DOWNLOADS

log = logging.getLogger(__name__)


def fetch(params: Params) -> None:
    obtain_files(DOWNLOADS)
    num_images = write_images(DOWNLOADS, BUILT_IN, params.fetch.fraction, params.seed)
    log.info("Fashion-MNIST: %d of 70000 images written to %s", num_images, BUILT_IN)
