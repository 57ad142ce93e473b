# `make` alone lists the targets. Python is enough for all of them; lint uses ruff and mypy where
# they are installed.
PYTHON ?= python3
RUFF_RULES = --line-length 100 --target-version py39 --select E,F,W,B
SMTP_PORT ?= 10025
API_PORT ?= 18025

.DEFAULT_GOAL := help
.PHONY: help run test check bench lint map docs

help: ## list the targets
	@awk -F ': ## ' '/^[a-z]+: ## / { printf "make %-6s %s\n", $$1, $$2 }' Makefile

run: ## start a server on high ports; its mail is gone when it stops
	@folder=$$(mktemp -d) && trap : INT TERM && cd "$$folder" && \
	$(PYTHON) "$(CURDIR)/pegmail.py" --smtp_port $(SMTP_PORT) --api_port $(API_PORT); \
	status=$$?; rm -rf "$$folder"; exit $$status

test: ## run all tests
	@$(PYTHON) -B test_pegmail.py

check: ## lint, then all tests, those of the file's shape among them
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory test

bench: ## measure; prints the README's table
	@$(PYTHON) -B test_pegmail.py bench

lint: ## compile without warnings; ruff and mypy where installed
	@$(PYTHON) -W error -c 'import pathlib, sys; \
	[compile(pathlib.Path(name).read_bytes(), name, "exec") for name in sys.argv[1:]]' \
	pegmail.py test_pegmail.py
	@if ruff --version >/dev/null 2>&1; then \
	ruff check --quiet $(RUFF_RULES) pegmail.py test_pegmail.py; \
	else echo "ruff is not installed: left out"; fi
	@if mypy --version >/dev/null 2>&1; then \
	mypy --no-error-summary --check-untyped-defs pegmail.py; \
	else echo "mypy is not installed: left out"; fi

map: ## print the floors of pegmail.py and their lines
	@awk 'function floor() { printf "%6d  %s\n", at - from, name } \
	BEGIN { name = "0. Head"; from = 1 } \
	/^# [0-9]+\. [A-Z]/ { at = FNR - 1; floor(); name = substr($$0, 3); from = at } \
	END { at = FNR + 1; floor(); printf "%6d  all\n", FNR }' pegmail.py

define WRITE_DOCS
import pegmail
head, begin, rest = open("README.md", encoding="utf-8").read().partition("<!-- options -->\n")
_, end, tail = rest.partition("<!-- /options -->\n")
assert begin and end, "README.md has lost its marks"
with open("README.md", "w", encoding="utf-8") as file:
    file.write(head + begin + pegmail.option_table() + "\n" + end + tail)
endef
export WRITE_DOCS

docs: ## write the option table into README.md
	@$(PYTHON) -B -c "$$WRITE_DOCS"
