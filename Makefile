# make demo        the whole road on the embedded model, from checkpoint to scored integers
# make test        the tests
# make table       the table of the README: methods by bit widths, 1,000 images each (about half an hour)
# make size        memory and time of every stage on 400 million parameters, random weights (about 10 minutes, 8 GB of disk)
# make training    what a step of distillation costs, beside training in full precision (about 15 minutes)
# make tricks      what each part of hqdm's variant auto gives: one thing changed at a time (about half an hour)
# make benchmark-cifar10 DATA=folder   every method by bit widths on a CIFAR-10 teacher (docs/cifar10.md)
# make lint        ruff
#
# The environment is made without ensurepip, which a bare Debian does not have; the outer pip (22.3 or newer) installs.
# Which build of torch: pip takes the one it finds. To choose, name it and the index that has it:
#     make demo TORCH=torch==2.13.0+cu130 TORCH_INDEX=<the PyTorch project's index of CUDA 13.0 wheels>

VENV := .venv
PYTHON ?= python3
# The interpreter outside the environment, also where that one is activated.
OUTER := $(shell PATH=$$(printf %s "$$PATH" | tr : '\n' | grep -vF '$(CURDIR)/$(VENV)/' | paste -sd :) command -v $(PYTHON))
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# One stamp for each choice of torch, so that another choice installs again.
READY := $(VENV)/.ready-$(shell printf '%s' '$(TORCH) $(TORCH_INDEX)' | cksum | cut -d ' ' -f 1)
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test table size training tricks benchmark-cifar10 lint clean

$(READY): pyproject.toml constraints.txt
	$(OUTER) -m venv --clear --without-pip $(VENV)
	$(OUTER) -m pip --python $(VENV)/bin/python install --quiet --disable-pip-version-check \
		$(addprefix --extra-index-url ,$(TORCH_INDEX)) --constraint constraints.txt $(TORCH) --editable '.[test]'
	touch $@

demo: $(READY)
	hqdm profile pipelines/digits/model.ckpt
	hqdm plan --method hqdm --bits w4a4
	hqdm distill --bits w4a4 --trajectories 20
	hqdm export --format int
	hqdm sample teacher fake int --count 500
	hqdm score
	hqdm report --picture $${HQDM_WORKSPACE:-workspace}/comparison.png

test: $(READY)
	python -m pytest --numprocesses=auto --dist=loadscope

table: $(READY)
	python -m benchmarks.digits --count 1000

size: $(READY)
	python -m benchmarks.size

training: $(READY)
	python -m benchmarks.training

tricks: $(READY)
	python -m benchmarks.tricks

# DATA is needed once: a folder with cifar10-train.tar.xz and cifar10-test.tar.xz, or with train/ and test/.
benchmark-cifar10: $(READY)
	python -m benchmarks.cifar10.run $(if $(DATA),--data '$(DATA)') --results benchmarks/results/cifar10

lint: $(READY)
	ruff check .

clean:
	rm -rf $(VENV)
