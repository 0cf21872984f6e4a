"""CIFAR-10 (Krizhevsky, 2009): the classifier that judges its samples, and how its images are read. The images
themselves do not come with the project.
"""

from pathlib import Path

HERE = Path(__file__).parent
CLASSIFIER = HERE / "classifier.safetensors"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIZE = 32  # pixels a side
