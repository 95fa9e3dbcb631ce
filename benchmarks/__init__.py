# SPDX-License-Identifier: Apache-2.0
"""What the README's numbers come from, each by one command. Needs the checkout; is no part of the package."""
