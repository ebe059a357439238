.PHONY: setup demo test lint model
setup demo test lint model:
	python3 dev.py $@
