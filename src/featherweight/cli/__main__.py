# SPDX-License-Identifier: Apache-2.0
"""`python -m featherweight.cli`, for where the script is not on the path."""

from featherweight.cli import main

if __name__ == "__main__":
    main()
