all:
	cargo build --release
demo:
	ci/demo
