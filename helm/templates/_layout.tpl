{{/* What the values ask for, as numbers, and the refusal of what cannot work. */}}

{{/* Whole CPUs of a container's resources, as the operator counts them for Ray. */}}
{{- define "m3serve.cpus" -}}
{{- $limits := .limits | default dict -}}
{{- $requests := .requests | default dict -}}
{{- $cpu := toString (coalesce $limits.cpu $requests.cpu "0") -}}
{{- if hasSuffix "m" $cpu -}}
{{- div (int64 (trimSuffix "m" $cpu)) 1000 -}}
{{- else -}}
{{- int64 (floor (float64 $cpu)) -}}
{{- end -}}
{{- end -}}

{{/* Of MiniMax-M3's 57 sparse layers, those that keep index keys; all, where the values do not tell. */}}
{{- define "m3serve.indexLayers" -}}
{{- $cache := .Values.engine.indexCache -}}
{{- $all := 57 -}}
{{- if or (ne $cache.reuse "lean") (eq (toString $cache.enabled) "false") .Values.settings.index_plan_file -}}
{{- $all -}}
{{- else if $cache.topkPattern -}}
{{- sub (len $cache.topkPattern) (len (replace "F" "" $cache.topkPattern)) -}}
{{- else if $cache.topkFreq -}}
{{- $count := 0 -}}
{{- range $ordinal := until $all -}}
{{- if eq 0 (mod (max 0 (sub $ordinal (int64 ($cache.skipTopkOffset | default 0)))) (int64 $cache.topkFreq)) -}}
{{- $count = add1 $count -}}
{{- end -}}
{{- end -}}
{{- $count -}}
{{- else -}}
{{- $all -}}
{{- end -}}
{{- end -}}

{{/*
Memory of one GPU with MiniMax-M3, in GiB: weights/tp + overhead; the engine takes a share of the rest for KV pages.
60 layers keep keys and values of 128 numbers for 4 KV heads divided among the ranks (one at least), the sparse ones
an index key of 128 numbers on every rank; an fp8 vector has a scale of 4 bytes.
*/}}
{{- define "m3serve.memory" -}}
{{- $engine := .Values.engine -}}
{{- $tp := int64 $engine.tensorParallelSize -}}
{{- $itemBytes := ternary 4 2 (eq $engine.dtype "float32") -}}
{{- $released := dict "bf16" 793.9 "mxfp8" 411.7 "mxfp4" 228.8 -}}
{{- $weights := .Values.model.weightsGiB -}}
{{- if kindIs "invalid" $weights -}}
{{- $weights = index $released .Values.model.format -}}
{{- if and (eq .Values.model.format "bf16") (eq $engine.dtype "float32") -}}
{{- $weights = mulf 2 $weights -}}
{{- end -}}
{{- end -}}
{{- $fraction := $engine.memoryFraction -}}
{{- if kindIs "invalid" $fraction -}}
{{- $fraction = 0.85 -}}
{{- end -}}
{{- $kvHeads := max 1 (div 4 $tp) -}}
{{- $kvVector := ternary 132 (mul 128 $itemBytes) (eq $engine.kvCacheDtype "fp8") -}}
{{- $indexVector := ternary 132 (mul 128 $itemBytes) (eq $engine.indexCacheDtype "fp8") -}}
{{- $tokenBytes := add (mul 60 2 $kvHeads $kvVector) (mul (include "m3serve.indexLayers" . | int64) $indexVector) -}}
{{- $weightsPerGpu := divf (float64 $weights) $tp -}}
{{- $free := subf (float64 (index .Values.accelerators .Values.accelerator).memoryGiB) $weightsPerGpu (float64 .Values.model.overheadGiB) -}}
{{- $pool := mulf $free (float64 $fraction) -}}
{{- $longest := int64 ($engine.maxModelLen | default 1048576) -}}
{{- $pages := int64 (.Values.settings.num_pages | default 0) -}}
{{- if $pages -}}
{{- $pool = divf (mulf $pages 128 $tokenBytes) 1073741824 -}}
{{- end -}}
tokenBytes: {{ $tokenBytes }}
weightsGiB: {{ $weights }}
weightsPerGpuGiB: {{ round $weightsPerGpu 1 }}
freeGiB: {{ round $free 1 }}
fraction: {{ $fraction }}
poolGiB: {{ round $pool 1 }}
poolTokens: {{ ternary (mul $pages 128) (mul 128 (int64 (floor (divf (mulf $pool 1073741824) $tokenBytes 128)))) (gt $pages 0) }}
longestTokens: {{ $longest }}
longestGiB: {{ round (divf (mulf $longest $tokenBytes) 1073741824) 1 }}
pagesExceed: {{ gt $pool $free }}
{{- end -}}

{{- define "m3serve.checkLayout" -}}
{{- $tp := int64 .Values.engine.tensorParallelSize -}}
{{- $replicas := int64 .Values.engine.replicas -}}
{{- $replicasName := "engine.replicas" -}}
{{- if .Values.engine.maxReplicas -}}
{{- $fewestName := ternary "engine.minReplicas" $replicasName (not (empty .Values.engine.minReplicas)) -}}
{{- $fewest := int64 (.Values.engine.minReplicas | default $replicas) -}}
{{- $replicasName = "engine.maxReplicas" -}}
{{- $replicas = int64 .Values.engine.maxReplicas -}}
{{- if gt $fewest $replicas -}}
{{- fail (printf "engine.maxReplicas is %d, and %s %d" $replicas $fewestName $fewest) -}}
{{- end -}}
{{- else if .Values.engine.minReplicas -}}
{{- fail "engine.minReplicas is for autoscaling of replicas: set engine.maxReplicas too" -}}
{{- end -}}
{{- $gpus := int64 .Values.worker.gpus -}}
{{- $pods := int64 .Values.worker.replicas -}}
{{- $minPods := int64 (.Values.worker.minReplicas | default 0) -}}
{{- $maxPods := int64 (.Values.worker.maxReplicas | default $pods) -}}
{{- if not (hasKey .Values.accelerators .Values.accelerator) -}}
{{- fail (printf "accelerator is %q, and accelerators has only %s" .Values.accelerator (keys .Values.accelerators | sortAlpha | join ", ")) -}}
{{- end -}}
{{- $device := index .Values.accelerators .Values.accelerator -}}
{{- if .Values.autoscaling.enabled -}}
{{- if or (gt $minPods $pods) (gt $pods $maxPods) -}}
{{- fail (printf "worker.minReplicas %d <= worker.replicas %d <= worker.maxReplicas %d does not hold" $minPods $pods $maxPods) -}}
{{- end -}}
{{- $pods = $maxPods -}}
{{- else if or .Values.worker.minReplicas .Values.worker.maxReplicas -}}
{{- fail "worker.minReplicas and worker.maxReplicas are for autoscaling.enabled: true; without it worker.replicas says how many pods there are" -}}
{{- end -}}

{{- if and $device.resourceName (eq $gpus 0) -}}
{{- fail (printf "worker.gpus is 0 with accelerator %s: ask for GPUs, or set accelerator: cpu" .Values.accelerator) -}}
{{- end -}}
{{- if and (not $device.resourceName) (gt $gpus 0) -}}
{{- fail (printf "worker.gpus is %d, and accelerator %s has no resourceName: set worker.gpus: 0" $gpus .Values.accelerator) -}}
{{- end -}}
{{- if and (gt $gpus 0) (eq .Values.engine.backend "torch") -}}
{{- fail (printf "engine.backend torch runs on CPU and would leave the %d GPUs of each pod idle: set it to auto or triton" $gpus) -}}
{{- end -}}
{{- if and (eq $gpus 0) (has .Values.engine.backend (list "triton" "aiter")) -}}
{{- fail (printf "engine.backend %s needs GPUs, and worker.gpus is 0" .Values.engine.backend) -}}
{{- end -}}
{{- if and (eq .Values.engine.backend "aiter") (not (hasPrefix "amd.com/" (default "" $device.resourceName))) -}}
{{- fail (printf "engine.backend aiter is for AMD GPUs, and accelerator %s is %s: set it to auto or triton" .Values.accelerator $device.resourceName) -}}
{{- end -}}

{{- if ne .Values.model.format "none" -}}
{{- if ne 0 (mod 64 $tp) -}}
{{- fail (printf "engine.tensorParallelSize is %d: it must divide the 64 query heads of MiniMax-M3" $tp) -}}
{{- end -}}
{{- if and (ne 0 (mod 4 $tp)) (ne 0 (mod $tp 4)) -}}
{{- fail (printf "engine.tensorParallelSize is %d: it must divide the 4 KV heads of MiniMax-M3 or be a multiple of 4" $tp) -}}
{{- end -}}
{{- end -}}

{{- $groups := 0 -}}
{{- if gt $gpus 0 -}}
{{- if gt $tp $gpus -}}
{{- fail (printf "engine.tensorParallelSize is %d and worker.gpus %d: the ranks of a group share one pod (STRICT_PACK); raise worker.gpus or lower engine.tensorParallelSize" $tp $gpus) -}}
{{- end -}}
{{- if ne 0 (mod $gpus $tp) -}}
{{- fail (printf "worker.gpus is %d and engine.tensorParallelSize %d: %d GPUs of every pod would stay idle; ask for a multiple" $gpus $tp (mod $gpus $tp)) -}}
{{- end -}}
{{- $groups = div $gpus $tp -}}
{{- if gt $replicas (mul $pods $groups) -}}
{{- fail (printf "%s is %d, and %d worker pods of %d GPUs hold %d groups of %d (engine.tensorParallelSize): raise worker.replicas or lower %s" $replicasName $replicas $pods $gpus (mul $pods $groups) $tp $replicasName) -}}
{{- end -}}
{{- end -}}

{{- $cpus := include "m3serve.cpus" .Values.worker.resources | int64 -}}
{{- $front := int64 .Values.http.replicas -}}
{{- if eq 0 $cpus -}}
{{- fail "worker.resources needs a cpu of 1 or more in limits or requests: Ray places processes by it" -}}
{{- end -}}
{{- if gt $tp $cpus -}}
{{- fail (printf "a group of %d ranks (engine.tensorParallelSize) takes as many CPUs of one pod, and worker.resources has %d" $tp $cpus) -}}
{{- end -}}
{{- $surge := div (add1 $front) 2 -}}
{{- $needed := add (mul $replicas (add1 $tp)) $front $surge -}}
{{- if gt $needed (mul $pods $cpus) -}}
{{- fail (printf "%d engine replicas x (%d ranks + 1) + %d HTTP processes + %d more during an update take %d CPUs, and %d worker pods x %d CPUs (worker.resources) are %d" $replicas $tp $front $surge $needed $pods $cpus (mul $pods $cpus)) -}}
{{- end -}}
{{- $crowd := min $groups (div (sub (add $replicas $pods) 1) $pods) -}}
{{- if gt (mul $crowd $tp) $cpus -}}
{{- fail (printf "%d groups of %d ranks in one pod take %d CPUs, and worker.resources has %d" $crowd $tp (mul $crowd $tp) $cpus) -}}
{{- end -}}

{{- if and (ne .Values.model.format "none") (gt $gpus 0) -}}
{{- $memory := include "m3serve.memory" . | fromYaml -}}
{{- $sum := printf "one GPU: %v GiB (accelerators.%s) - weights in %s %v GiB / %d ranks = %v GiB - model.overheadGiB %v leaves %v GiB" $device.memoryGiB .Values.accelerator .Values.model.format $memory.weightsGiB $tp $memory.weightsPerGpuGiB .Values.model.overheadGiB $memory.freeGiB -}}
{{- $need := printf "one request of %d tokens (engine.maxModelLen) x %d bytes takes %v GiB" (int64 $memory.longestTokens) (int64 $memory.tokenBytes) $memory.longestGiB -}}
{{- if le (float64 $memory.freeGiB) 0.0 -}}
{{- fail (printf "the weights do not fit; %s; use more ranks, another model.format, or GPUs with more memory" $sum) -}}
{{- end -}}
{{- if $memory.pagesExceed -}}
{{- fail (printf "settings.num_pages does not fit: its pages take %v GiB; %s" $memory.poolGiB $sum) -}}
{{- end -}}
{{- if lt (int64 $memory.poolTokens) (int64 $memory.longestTokens) -}}
{{- fail (printf "the KV pages do not fit; %s, of which %v GiB are for pages (engine.memoryFraction %v, or settings.num_pages); %s; lower engine.maxModelLen, use more ranks or fp8 pages" $sum $memory.poolGiB $memory.fraction $need) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Everything that is refused and is not the layout's. */}}
{{- define "m3serve.checkValues" -}}
{{- $name := include "m3serve.fullname" . -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (printf "the release would be called %s, and a RayService's name starts with a letter and has small letters, digits and - alone: set fullnameOverride" $name) -}}
{{- end -}}
{{- $weights := .Values.model.weights -}}
{{- if not (hasPrefix (printf "%s/" (trimSuffix "/" $weights.mountPath)) (printf "%s/" .Values.model.path)) -}}
{{- fail (printf "model.path %s is not in model.weights.mountPath %s" .Values.model.path $weights.mountPath) -}}
{{- end -}}
{{- $usesClaim := or (eq $weights.source "pvc") (and (eq $weights.source "download") (eq $weights.download.into "pvc")) -}}
{{- if and $usesClaim (not $weights.pvc.claimName) -}}
{{- fail "model.weights.pvc.claimName is empty: name the claim that holds the checkpoint" -}}
{{- end -}}
{{- if and $weights.pvc.create (not $usesClaim) -}}
{{- fail (printf "model.weights.pvc.create is true, and model.weights.source %s does not use the claim" $weights.source) -}}
{{- end -}}
{{- if and (eq $weights.source "hostPath") (not $weights.hostPath.path) -}}
{{- fail "model.weights.source is hostPath: set model.weights.hostPath.path" -}}
{{- end -}}
{{- if and (eq $weights.source "download") (not $weights.download.command) (not $weights.download.args) -}}
{{- fail "model.weights.source is download: set model.weights.download.command" -}}
{{- end -}}
{{- $mostPods := max (int64 .Values.worker.replicas) (int64 (.Values.worker.maxReplicas | default 0)) -}}
{{- if and (eq $weights.source "download") (eq $weights.download.into "pvc") (gt $mostPods 1) -}}
{{- fail (printf "model.weights.download.into pvc with %d worker pods: they would write the same files; fill the claim with a Job, or use emptyDir" $mostPods) -}}
{{- end -}}

{{- range $list := list .Values.env .Values.head.env .Values.worker.env -}}
{{- range $list -}}
{{- if has .name (list "ROCR_VISIBLE_DEVICES" "CUDA_VISIBLE_DEVICES" "HIP_VISIBLE_DEVICES") -}}
{{- fail (printf "env %s is refused: Ray gives every rank its device, and ROCR_VISIBLE_DEVICES keeps Ray from starting" .name) -}}
{{- end -}}
{{- if eq .name "PROMETHEUS_MULTIPROC_DIR" -}}
{{- fail "env PROMETHEUS_MULTIPROC_DIR is refused: Ray's own processes would write there; monitoring.exporter.directory is set for m3serve's alone" -}}
{{- end -}}
{{- if has .name (list "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S" "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S") -}}
{{- fail (printf "env %s is refused: it is derived from drain.longestGenerationSeconds" .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- if and (eq .Values.upgradeStrategy.type "NewClusterWithIncrementalUpgrade") (not .Values.autoscaling.enabled) -}}
{{- fail "upgradeStrategy.type NewClusterWithIncrementalUpgrade needs autoscaling.enabled: true" -}}
{{- end -}}
{{- if and (eq .Values.upgradeStrategy.type "NewClusterWithIncrementalUpgrade") (not .Values.upgradeStrategy.incremental.gatewayClassName) -}}
{{- fail "upgradeStrategy.type NewClusterWithIncrementalUpgrade needs upgradeStrategy.incremental.gatewayClassName" -}}
{{- end -}}
{{- with .Values.upgradeStrategy.incremental -}}
{{- if gt (int64 .stepSizePercent) (int64 .maxSurgePercent) -}}
{{- fail (printf "upgradeStrategy.incremental.stepSizePercent %v is more than maxSurgePercent %v" .stepSizePercent .maxSurgePercent) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.gcsFaultTolerance.enabled (not .Values.gcsFaultTolerance.redisAddress) -}}
{{- fail "gcsFaultTolerance.enabled needs gcsFaultTolerance.redisAddress" -}}
{{- end -}}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) -}}
{{- fail "httpRoute.enabled needs httpRoute.parentRefs, the Gateway to attach to" -}}
{{- end -}}
{{- if gt (int64 (.Values.podDisruptionBudget.minAvailable | default 0)) (int64 .Values.worker.replicas) -}}
{{- fail (printf "podDisruptionBudget.minAvailable is %v, and there are %v worker pods (worker.replicas)" .Values.podDisruptionBudget.minAvailable .Values.worker.replicas) -}}
{{- end -}}

{{- $ports := dict "6379" "Ray's GCS" "8265" "Ray's dashboard" "10001" "Ray's client server" "8080" "Ray's metrics" -}}
{{- $wanted := list (list "http.port" .Values.http.port) -}}
{{- if .Values.monitoring.exporter.enabled -}}
{{- $wanted = append $wanted (list "monitoring.exporter.port" .Values.monitoring.exporter.port) -}}
{{- end -}}
{{- if .Values.haproxy.enabled -}}
{{- $wanted = append $wanted (list "haproxy.metricsPort" .Values.haproxy.metricsPort) -}}
{{- $wanted = append $wanted (list "haproxy.statsPort" .Values.haproxy.statsPort) -}}
{{- end -}}
{{- range $wanted -}}
{{- $port := index . 1 | int64 | toString -}}
{{- if hasKey $ports $port -}}
{{- fail (printf "%s is %s, which is the port of %s" (first .) $port (get $ports $port)) -}}
{{- end -}}
{{- $_ := set $ports $port (first .) -}}
{{- end -}}
{{- end -}}
