# Every target is a thin call; scripts/ and the `clipfast` command do the work.
# ARGS passes options on: make demo ARGS="--steps 50", make test ARGS="-k tokenizer".

# tests run in so many processes, each with one thread, and so do the programs that they start: more would wait for each other
JOBS ?= 2
# tests/conftest.py puts the longest files first
PYTEST = OMP_NUM_THREADS=1 .venv/bin/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-all test-cuda-build exhaustive bench kernels wheel sdist gpu lint clean

help:
	@echo "make demo      train a small CLIP on real pairs and write runs/demo/report.html"
	@echo "make test      prove it equal to open_clip, transformers and timm (without the slow tests)"
	@echo "make test-all  the slow tests too"
	@echo "make test-cuda-build  test the op library beside CUDA builds of PyTorch; no GPU is needed; fetches gigabytes once"
	@echo "make exhaustive  compile every configuration of every Triton kernel, interpret attention at every size: half an hour or more"
	@echo "make bench     time clipfast beside its rivals"
	@echo "make kernels   compile every Triton kernel for four GPU generations and reckon what it costs; no GPU is needed"
	@echo "make wheel     one wheel for every Python and card into dist/; no GPU is needed; CPU=1, or ARCHS=\"9.0a\""
	@echo "make sdist     the sources that pip builds a wheel from, into dist/"
	@echo "make gpu       on a machine with an NVIDIA GPU: what needs one, in 9 minutes; PART=tests, bench or cpu for some of it"
	@echo "make lint      ruff"

demo:
	scripts/setup_env.sh demo
	.venv/bin/clipfast demo $(ARGS)

test:
	scripts/setup_env.sh test
	$(PYTEST) -m "not slow and not exhaustive and not gpu" $(ARGS)

test-all:
	scripts/setup_env.sh test
	$(PYTEST) -m "not exhaustive and not gpu" $(ARGS)

test-cuda-build:
	scripts/setup_env.sh test
	scripts/test_cuda_build.sh $(ARGS)

exhaustive:
	scripts/setup_env.sh test
	.venv/bin/pytest -m exhaustive $(ARGS)

bench:
	scripts/setup_env.sh test bench
	.venv/bin/pytest benchmarks $(ARGS)

kernels:
	scripts/setup_env.sh test
	.venv/bin/python scripts/compile_kernels.py $(ARGS)

wheel:
	scripts/setup_env.sh wheel
	.venv/bin/python scripts/build_wheel.py $(if $(filter 1,$(CPU)),--cpu) $(if $(ARCHS),--archs "$(ARCHS)") $(ARGS)

sdist:
	scripts/setup_env.sh wheel
	.venv/bin/python scripts/build_wheel.py --sdist

gpu:
	scripts/gpu.sh $(PART)

lint:
	scripts/setup_env.sh test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:
	rm -rf build dist .venv runs clipfast/libclipfast.so clipfast/_build.json clipfast.egg-info
