# make demo        the whole road on the embedded model, from checkpoint to scored integers
# make test        the tests
# make test-crash  kills every stage at random moments, 60 times (about 20 minutes; SEED=number repeats its moments)
# make size        memory and time of every stage on 400 million parameters, random weights (about 10 minutes, 8 GB of disk)
# make training    what a step of distillation costs, beside training in full precision (about 15 minutes)
# make bench       a step of published models' shapes in fp32, bfloat16 and integers on this machine, with its memory, and an
#                  update of distillation at that size (about half an hour, 8 GB of disk)
# make others      the same step by torchao, optimum-quanto, onnxruntime and OpenVINO, those that are in .venv (docs/speed.md says
#                  how they get there; about an hour, 10 GB of disk)
# make scaling     how that step grows with batch, image and width, with a picture (about half an hour, 17 GB of disk)
# make tricks      what each part of hqdm's variant auto gives: one thing changed at a time (about 40 minutes)
# make benchmark-cifar10 DATA=folder   every method by bit widths on a CIFAR-10 teacher, the close calls with three
#                  seeds and with 10,000 images, orders of the transform, and tuned baselines (docs/cifar10.md; hours)
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

.PHONY: demo test test-crash size training bench others scaling tricks benchmark-cifar10 lint clean

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
	python -m pytest --numprocesses=auto --dist=loadscope --no-loadscope-reorder

test-crash: $(READY)
	python -m pytest -m nightly -s tests/test_crash.py $(if $(SEED),--crash-seed $(SEED))

size: $(READY)
	python -m benchmarks.size

training: $(READY)
	python -m benchmarks.training

bench: $(READY)
	python -m benchmarks.speed
	python -m benchmarks.training --only updates --turns 3 --steps 2 --batch-of-images 1 \
		--model runs/speed/cin256-v2.ckpt --methods hqdm/code

others: $(READY)
	python -m benchmarks.others

scaling: $(READY)
	python -m benchmarks.scaling

tricks: $(READY)
	hqdm compare --from benchmarks/tricks.yaml -w runs/tricks

# DATA is needed once: a folder with cifar10-train.tar.xz and cifar10-test.tar.xz, or with train/ and test/. Without it,
# and without cells of before, the committed tables are printed.
benchmark-cifar10: $(READY)
	python -m benchmarks.cifar10.tables $(if $(DATA),--data '$(DATA)')

lint: $(READY)
	ruff check .

clean:
	rm -rf $(VENV)
