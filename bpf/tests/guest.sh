#!/bin/sh
# Runs the tests of this crate on another kernel, in a TCG guest: no KVM, no image, about three minutes.
#
#   cargo test -p varve-bpf --no-run
#   apt-get download linux-image-6.1.0-50-cloud-amd64-unsigned && dpkg-deb -x linux-image-6.1*.deb k-6.1
#   bpf/tests/guest.sh k-6.1
#
# The directory is an unpacked kernel package (boot/vmlinuz-*, lib/modules/*). Needs qemu-system-x86, busybox-static,
# cpio, fio. Debian's kernels have KASLR and KALLSYMS_ALL, so the other way of calibration is exercised, too. Left out:
# what needs ext4 (not in cloud kernels), a real disk, or nbdkit.
set -eu
kernel=$1
deps=$(cd "$(dirname "$0")/../../target/debug/deps" && pwd)
root=$(mktemp -d /var/tmp/varve-guest.XXXXXX)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root"/bin "$root"/proc "$root"/sys "$root"/dev "$root"/tmp "$root"/var/tmp "$root"/modules "$root"/t

add() { # a program with its libraries, under $2 or where it stands
    to=$root${2:-$1}
    mkdir -p "$(dirname "$to")" && cp -L "$1" "$to"
    ldd "$1" 2>/dev/null | grep -o '/[^ ]*' | while read -r library; do
        [ -e "$root$library" ] || { mkdir -p "$root$(dirname "$library")" && cp -L "$library" "$root$library"; }
    done
}
cp "$(command -v busybox)" "$root"/bin/busybox
for applet in sh mount umount mknod mkdir uname sysctl poweroff insmod grep cat; do ln -s busybox "$root/bin/$applet"; done
for program in /usr/sbin/losetup /usr/sbin/sfdisk /usr/bin/partx /usr/bin/fio; do add $program; done
for test in replay faults; do
    binary=$(find "$deps" -maxdepth 1 -name "$test-*" -type f -perm -u+x -printf '%T@ %p\n' | sort -rn | head -1 | cut -d' ' -f2-)
    add "$binary" /t/$test
    "$binary" --list | sed -n 's/: test$//p' | grep -v -E 'filesystem|on_disk|held_write' | sed "s/^/$test:/" >> "$root/tests"
done
for module in crc32c_generic libcrc32c lzo_compress lzo lzo-rle lz4_compress lz4hc_compress 842_compress zstd_compress \
    zsmalloc zram loop; do
    file=$(find "$kernel/lib/modules" -name "$module.ko*" | head -1)
    case $file in
    '') ;;
    *.xz) xz -dc "$file" > "$root/modules/$module.ko" ;;
    *) cp "$file" "$root/modules/" ;;
    esac
    echo $module >> "$root/modules/order"
done
cat > "$root/init" <<'INIT'
#!/bin/sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin RUST_BACKTRACE=0
mount -t proc p /proc; mount -t sysfs s /sys; mount -t devtmpfs d /dev; mkdir -p /dev/shm
for at in /dev/shm /var/tmp /tmp; do mount -t tmpfs t $at; done
mount -t securityfs s /sys/kernel/security; mount -t bpf b /sys/fs/bpf
for module in $(cat /modules/order); do insmod /modules/$module.ko 2>/dev/null; done
uname -r
for test in $(cat /tests); do
    echo "== $test"
    /t/${test%%:*} --exact --test-threads 1 --nocapture ${test##*:} 2>&1 | grep -E 'panicked|^  |differ,|test result'
done
echo "guest done"
poweroff -f
INIT
chmod +x "$root/init"
(cd "$root" && find . | cpio -o -H newc 2>/dev/null | gzip -1) > "$root.initrd"
log=$(mktemp /var/tmp/varve-guest-log.XXXXXX)
timeout 900 qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 2 -m 2G -nographic -no-reboot \
    -kernel "$kernel"/boot/vmlinuz-* -initrd "$root.initrd" -append "console=ttyS0 quiet panic=-1" < /dev/null | tee "$log"
rm -f "$root.initrd"
grep -q 'guest done' "$log" && ! grep -q 'FAILED' "$log"
