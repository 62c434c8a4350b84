"""The data sets that have names, which `bench.data.datasets.READERS` reads; every other name is a
directory's."""

KNOWN = {"digits": 8, "cifar10": 32, "cifar100": 32}  # and how many pixels wide their images are
TRAINING_IMAGES = {"digits": 1437, "cifar10": 50_000, "cifar100": 50_000}  # with val 0
