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

ORDERS := 8 16 32 64
TUNED := hqdm/tuned efficientdm/tuned quest/tuned mpq_dm/tuned double_hadamard/tuned mpq_dm/tuned:mixed=false
VARIANTS := $(TUNED) lsq/tuned double_hadamard/distilled rtn/search smoothquant/search outlier_suppression/search \
	hadanorm:convolutions=rotated q_diffusion:shortcuts=float
OTHERS := dmq/search apq_dm:groups=10 ptqd/tuned tfmq/tuned q_diffusion/tuned ptq4dm/reconstructed
# What was changed after some of the widths' own tables were made.
MENDED := hqdm/auto hqdm/ours hqdm/code efficientdm mpq_dm tfmq dmq hadanorm rtn smoothquant outlier_suppression
START := efficientdm hqdm/code
PARTS := orders=none orders=32 signs=false double=false quantiser=symmetric
LARGE := hqdm double_hadamard quest lsq apq_dm q_diffusion ptq4dm
MORE := mpq_dm dmq smoothquant tfmq hadanorm
WIDTHS := w8a8 w4a8 w8a4 w4a4 w4a3 w3a3 w2a4

# DATA is needed once: a folder with cifar10-train.tar.xz and cifar10-test.tar.xz, or with train/ and test/.
benchmark-cifar10: $(READY)
	python -m benchmarks.cifar10.run $(if $(DATA),--data '$(DATA)') --methods hqdm/auto hqdm/code efficientdm --bits w4a4,w4a3,w3a3 --seeds 0 1 2 \
		--results benchmarks/results/cifar10/seeds
	python -m benchmarks.cifar10.run --methods hqdm/auto --bits w4a4,w4a3,w3a3 --trajectories 16 \
		--results benchmarks/results/cifar10/seconds
	python -m benchmarks.cifar10.run --methods hqdm/auto --bits w4a4,w4a3,w3a3 --trajectories 3 \
		--results benchmarks/results/cifar10/searched
	python -m benchmarks.cifar10.run --methods hqdm/code efficientdm --bits w4a3 --trajectories 160 \
		--results benchmarks/results/cifar10/longer
	python -m benchmarks.cifar10.run --bits w4a3,w4a4 --seeds 0 1 2 --results benchmarks/results/cifar10/start \
		--methods $(START:%=%:recipe.activation_scale_from=trajectory)
	python -m benchmarks.cifar10.run --bits w4a3 --trajectories 160 --results benchmarks/results/cifar10/start-longer \
		--methods $(START:%=%:recipe.activation_scale_from=trajectory)
	python -m benchmarks.cifar10.run --methods hqdm/auto:budget=1 hqdm/auto:budget=0.75 --bits w4a3 \
		--results benchmarks/results/cifar10/budget
	python -m benchmarks.cifar10.run --methods $(MENDED) --bits w8a8,w4a8,w8a4,w2a4 --results benchmarks/results/cifar10/mended
	python -m benchmarks.cifar10.run --methods $(ORDERS:%=hqdm/code:order=%) --bits w4a4,w4a3 \
		--results benchmarks/results/cifar10/orders
	python -m benchmarks.cifar10.run --methods hqdm/auto hqdm/code efficientdm --bits w4a4,w4a3,w3a3 --count 10000 \
		--results benchmarks/results/cifar10/large
	python -m benchmarks.cifar10.run --methods hqdm/auto hqdm/code efficientdm --bits w8a8,w4a8,w8a4,w2a4 --count 10000 \
		--results benchmarks/results/cifar10/large-widths
	for width in $(WIDTHS); do \
		python -m benchmarks.cifar10.run --bits $$width --results benchmarks/results/cifar10/$$width || exit 1; done
	python -m benchmarks.cifar10.run --methods $(LARGE) --bits w4a3 --count 10000 --results benchmarks/results/cifar10/large-w4a3
	python -m benchmarks.cifar10.run --methods $(MORE) --bits w4a3 --count 10000 --results benchmarks/results/cifar10/large-w4a3-more
	python -m benchmarks.cifar10.run --methods $(VARIANTS) --bits w4a4,w4a3 --results benchmarks/results/cifar10/variants
	python -m benchmarks.cifar10.run --methods $(TUNED) --bits w3a3 --results benchmarks/results/cifar10/variants-w3a3
	python -m benchmarks.cifar10.run --bits w4a4,w4a3,w3a3 --seeds 0 1 2 --results benchmarks/results/cifar10/tuned \
		--methods hqdm/tuned efficientdm/tuned mpq_dm/tuned mpq_dm/tuned:mixed=false smoothquant/search
	python -m benchmarks.cifar10.run --methods $(OTHERS) --bits w4a4,w4a3,w3a3 --results benchmarks/results/cifar10/tuned-others
	python -m benchmarks.cifar10.run --bits w3a3 --results benchmarks/results/cifar10/w3a3-more \
		--methods hadanorm:convolutions=rotated rtn/search outlier_suppression/search lsq/tuned double_hadamard/distilled
	python -m benchmarks.cifar10.run --methods hqdm/auto:recipe.guidance_signal=0 --bits w4a4,w4a3,w3a3 \
		--results benchmarks/results/cifar10/guidance
	python -m benchmarks.cifar10.run --from benchmarks/tricks.yaml --bits w4a3 --results benchmarks/results/cifar10/tricks
	python -m benchmarks.cifar10.run --methods hqdm/auto $(PARTS:%=hqdm/auto:%) hqdm/code hqdm/paper --bits w4a3 \
		--results benchmarks/results/cifar10/parts
	python -m benchmarks.cifar10.run --methods hqdm/auto:signs=false --bits w4a4,w4a3 --seeds 0 1 2 \
		--results benchmarks/results/cifar10/signs
	python -m benchmarks.cifar10.run --methods hqdm/auto --bits w4a3 --trajectories 10 --images 16 \
		--results benchmarks/results/cifar10/images-16
	python -m benchmarks.cifar10.run --methods hqdm/auto --bits w4a3 --trajectories 40 --images 4 \
		--results benchmarks/results/cifar10/images-4
	python -m benchmarks.cifar10.run --methods hqdm/paper --bits w4a4,w4a3,w3a3 --results benchmarks/results/cifar10/paper
	python -m benchmarks.cifar10.run --methods q_diffusion:shortcuts=float --bits w4a8 --results benchmarks/results/cifar10/shortcuts
	python -m benchmarks.cifar10.run --teacher dit --bits w4a4 --count 500 --workspace runs/cifar10/dit \
		--methods hqdm/auto hqdm/code efficientdm hadanorm rtn smoothquant double_hadamard \
		--results benchmarks/results/cifar10/dit
	python -m benchmarks.cifar10.widths
	python -m benchmarks.cifar10.widths --picture docs/pictures/cifar10-widths.png

lint: $(READY)
	ruff check .

clean:
	rm -rf $(VENV)
