"""`python -m embedd_dagster.webserver --host … --port … --workspace …`."""

from embedd_dagster.webserver.app import main

if __name__ == "__main__":
    main()
